"""What is added to the loss or replaces it, against the formulas written out; which text a step reads."""

import math

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from hiplora.training import losses as module
from hiplora.training.losses import KlPenalty, TokenLoss, kl_without_target, token_weights
from hiplora.training.recipe import TrainRecipe
from tests.tiny import tiny_llama, tiny_tokenizer

ROWS = [torch.arange(0, 40) * 3 % 250, torch.arange(0, 30) * 7 % 250, torch.arange(5, 45)]


def adapted(**settings):
    config = LoraConfig(r=4, init_lora_weights=False, lora_dropout=0.5, **settings)
    return get_peft_model(tiny_llama(), config)


def divergence(model, row):
    """The definition, on one text alone."""
    with torch.no_grad():
        q = F.log_softmax(model.eval()(row[None]).logits[0].double(), -1)
        with model.disable_adapter():
            p = F.log_softmax(model(row[None]).logits[0].double(), -1)
    return (p.exp() * (p - q)).sum().item()


def test_it_is_the_mean_divergence_per_token_of_texts_that_do_not_see_each_other():
    model = adapted()
    penalty = KlPenalty(ROWS, 1.0, 65, seed=1)
    pieces = penalty.batch(3)
    assert len(pieces) > 1
    expected = sum(divergence(model, piece) for piece in pieces) / sum(map(len, pieces))
    assert penalty(model.train(), 3).item() == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-3


def test_only_the_adapter_gets_a_gradient_and_the_model_is_left_as_it_was():
    model = adapted(modules_to_save=["lm_head"])
    frozen = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    frozen.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    model.train()
    model.base_model.model.model.norm.eval()
    modes = {name: m.training for name, m in model.named_modules()}
    state = torch.random.get_rng_state()
    KlPenalty(ROWS, 1.0, 30, seed=0)(model, 0).backward()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == {name for name, flag in flags.items() if flag}


def test_every_text_is_read_once_a_pass_in_an_order_of_seed_and_step_alone():
    rows = [torch.tensor([row] * 8) for row in range(6)]

    def read(seed):
        penalty = KlPenalty(rows, 1.0, 16, seed=seed)
        return [int(piece[0]) for step in range(6) for piece in penalty.batch(step)]

    assert [sorted(lap) for lap in (read(3)[:6], read(3)[6:])] == [list(range(6))] * 2
    assert read(3)[:6] != read(3)[6:]
    assert read(3) == read(3) != read(4)


@pytest.mark.parametrize(("tokens", "lengths"), [(8, [8]), (256, [256]), (300, [256, 44])])
def test_a_step_reads_the_requested_number_of_tokens(tokens, lengths):
    rows = [torch.zeros(256, dtype=torch.long)] * 5
    assert [len(piece) for piece in KlPenalty(rows, 1.0, tokens, seed=0).batch(7)] == lengths


def test_a_recipe_names_its_text_or_has_it_sampled(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abc " * 100, encoding="utf-8")

    def penalty(**changes):
        values = {"model": "m", "data": "d.jsonl", "method": "lora", "train": changes}
        return module.kl_penalty(TrainRecipe.model_validate(values), tiny_llama(), tiny_tokenizer())

    assert penalty() is None
    read = penalty(kl_weight=0.5, kl_text=path, kl_pool=40, kl_tokens=40)
    assert tiny_tokenizer().decode(read.batch(0)[0]) == "abc " * 10
    sampled = penalty(kl_weight=0.5, kl_pool=500, kl_tokens=512)
    assert sum(map(len, sampled.batch(0))) >= 256


LOGITS = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)).double() * 3
TARGET = torch.tensor([3, 0, 39, 7, 7])


def test_the_weights_of_tokens_are_those_of_the_papers():
    p = LOGITS.softmax(-1)
    assert token_weights(LOGITS, TARGET, "dft").tolist() == pytest.approx(
        [p[t, y].item() for t, y in enumerate(TARGET)]
    )
    for t, weight in enumerate(token_weights(LOGITS, TARGET, "eaft").tolist()):
        top = sorted(p[t].tolist())[-20:]
        shares = [one / sum(top) for one in top]
        assert weight == pytest.approx(-sum(q * math.log(q) for q in shares) / math.log(20))
    assert token_weights(LOGITS, TARGET, "none").tolist() == [1.0] * 5


def test_the_divergence_without_the_right_token_is_that_of_what_remains():
    other = LOGITS.flip(0).requires_grad_()
    found = kl_without_target(LOGITS, other, TARGET)
    for t, y in enumerate(TARGET):
        p, q = (torch.cat([row[t, :y], row[t, y + 1 :]]).softmax(-1) for row in (LOGITS, other))
        assert found[t].item() == pytest.approx((p * (p / q).log()).sum().item())
    found.sum().backward()
    assert other.grad.isfinite().all()
    assert (other.grad[range(5), TARGET] == 0).all()


@pytest.mark.parametrize(("kind", "own_kl"), [("none", 0.0), ("dft", 0.0), ("eaft", 0.0), ("none", 2.0)])
def test_the_loss_of_a_batch_is_the_sum_over_its_learned_tokens(kind, own_kl):
    model = adapted().eval()
    ids = ROWS[0][None, :12]
    labels = ids.clone()
    labels[:, :5] = -100
    loss = TokenLoss(kind, own_kl)(model, {"input_ids": ids, "labels": labels}, 4)
    logits, right = model(ids).logits[0, 4:-1], labels[0, 5:]
    with torch.no_grad(), model.disable_adapter():
        base = model(ids).logits[0, 4:-1]
    losses = F.cross_entropy(logits, right, reduction="none") * token_weights(logits, right, kind)
    expected = (losses + own_kl * kl_without_target(base, logits, right)).sum() / 4
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    if kind == "none" and not own_kl:
        assert loss.item() == pytest.approx(losses.sum().item() / 4)
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_tokens_that_the_base_finds_unlikely_are_masked():
    model, ids = tiny_llama(), ROWS[0].tolist()
    model.lm_head.weight.data *= 200  # sure of something
    sure = model(ROWS[0][None]).logits[0].argmax(-1).tolist()
    row = {"input_ids": ids, "labels": [-100, *sure[:1], *ids[2:]]}
    row["input_ids"][1] = sure[0]
    learned = row["labels"].copy()
    chances = model(torch.tensor(row["input_ids"])[None]).logits[0].softmax(-1)
    taken = module.mask_unlikely(model, [row])
    expected = [
        label if place and chances[place - 1, row["input_ids"][place]] >= 0.4 else -100
        for place, label in enumerate(learned)
    ]
    assert row["labels"] == expected
    assert taken == sum(label == -100 for label in expected) - 1 > 0


def test_replayed_rows_are_the_models_own_and_learned_whole():
    rows = module.replay_rows(tiny_llama(), 3, 20)
    assert [len(row["input_ids"]) for row in rows] == [20, 20, 20]
    assert all(row["labels"] == row["input_ids"] for row in rows)
