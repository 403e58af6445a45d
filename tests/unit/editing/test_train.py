import pytest
import torch
from peft import LoraConfig, get_peft_model

import hiplora
from hiplora.editing import Edit, EditTraining, evaluate_edits, train_edits
from hiplora.errors import AdapterError, ConfigError
from tests.tiny import tiny_llama, tiny_tokenizer

EDITS = [
    Edit(f"Thing {i} is", "cyan", new, f"thing {i}", "Entity/Attribute", f"It, thing {i}, is")
    for i, new in enumerate(("blue", "pink", "grey"))
]


def adapted(kind="lora"):
    torch.manual_seed(0)
    config = (
        LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
        if kind == "lora"
        else hiplora.HipLoraConfig(r=8, lora_alpha=16, principal_rank=4)
    )
    return get_peft_model(tiny_llama(), config)


@pytest.mark.parametrize("kind", ["lora", "hiplora"])
def test_training_makes_the_new_answers_the_likelier_ones(kind):
    model, tokenizer = adapted(kind), tiny_tokenizer()
    before = [o.log_prob_new - o.log_prob_old for o in evaluate_edits(model, tokenizer, EDITS)]
    result = train_edits(model, tokenizer, EDITS, EditTraining(steps=40, lr=2e-2, batch_size=3))
    after = evaluate_edits(model, tokenizer, EDITS)
    assert not all(difference > 0 for difference in before)
    assert all(outcome.preferred for outcome in after)
    assert result.curve[-1] < result.curve[0] - 0.5
    assert result.tokens == 40 * sum(len(tokenizer(f"{e.prompt} {e.new}")["input_ids"]) for e in EDITS)
    assert not model.training
    if kind == "hiplora":
        assert hiplora.max_leak(model) < 1e-5


def test_the_first_loss_is_the_mean_over_the_answers_tokens():
    model, tokenizer = adapted(), tiny_tokenizer()
    result = train_edits(model, tokenizer, EDITS, EditTraining(steps=1, batch_size=3))
    fresh = evaluate_edits(adapted(), tokenizer, EDITS)
    tokens = sum(len(f" {edit.new}") for edit in EDITS)
    assert result.curve == (pytest.approx(-sum(o.log_prob_new for o in fresh) / tokens, rel=1e-5),)


def test_the_same_seed_gives_the_same_run_and_another_seed_another_order():
    def curve(seed):
        training = EditTraining(steps=4, lr=1e-2, batch_size=2, seed=seed)
        return train_edits(adapted(), tiny_tokenizer(), EDITS, training).curve

    assert curve(1) == curve(1)
    assert curve(1) != curve(2)


def test_every_edit_is_seen_equally_often_though_batches_cross_epochs():
    rows = []
    model = adapted()
    model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(kwargs["input_ids"]), with_kwargs=True
    )
    train_edits(model, tiny_tokenizer(), EDITS, EditTraining(steps=3, batch_size=2))
    seen = [tuple(row.tolist()) for batch in rows for row in batch]
    assert len(seen) == 6
    assert sorted(map(seen.count, set(seen))) == [2, 2, 2]


def test_steps_are_reported_as_they_come():
    rows = []
    result = train_edits(adapted(), tiny_tokenizer(), EDITS, EditTraining(steps=2, batch_size=2), rows.append)
    assert [(row["step"], row["steps"], row["loss"]) for row in rows] == [
        (1, 2, result.curve[0]),
        (2, 2, result.curve[1]),
    ]
    assert all(row["tokens_per_second"] > 0 for row in rows)


def test_a_model_with_nothing_to_train_is_an_error():
    model = tiny_llama().requires_grad_(False)
    with pytest.raises(AdapterError, match="no trainable parameter"):
        train_edits(model, tiny_tokenizer(), EDITS, EditTraining())


def test_a_loss_that_is_not_finite_is_an_error_that_names_the_step():
    model = adapted()
    with torch.no_grad():
        model.base_model.model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(AdapterError, match=r"nan at step 1; lower the learning rate"):
        train_edits(model, tiny_tokenizer(), EDITS, EditTraining(steps=1))


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch_size": 0}, {"lr": 0.0}, {"lr": float("inf")}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        EditTraining(**wrong)
