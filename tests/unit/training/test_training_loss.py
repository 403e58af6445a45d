"""The trainer's loss is TRL's and the formula's, computed where something is learned; packed rows stay apart."""

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import SFTTrainer

from hiplora.training import build, trainer
from hiplora.training.attention import NAME, use_packed_attention
from hiplora.training.metrics import Record
from hiplora.training.recipe import TrainRecipe
from hiplora.training.run import RunFolder
from tests.tiny import tiny_llama, tiny_tokenizer

LENGTHS = (7, 19, 4, 11)


def documents(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (length,), generator=generator) for length in LENGTHS]


def labels_of(document, prompt):
    labels = document.clone()
    labels[:prompt] = -100
    return labels


def flattened(texts):
    positions = torch.cat([torch.arange(len(text)) for text in texts])
    edges = torch.tensor([0, *torch.tensor([len(text) for text in texts]).cumsum(0)], dtype=torch.int32)
    return {"input_ids": torch.cat(texts)[None], "position_ids": positions[None], "cu_seq_lens_q": edges}


def test_packed_documents_get_the_logits_that_they_get_alone():
    model, texts = tiny_llama(), documents()
    alone = torch.cat([model(text[None]).logits[0] for text in texts])
    assert use_packed_attention(model, 64)
    together = model(**flattened(texts), use_cache=False).logits[0]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_without_boundaries_the_positions_tell_the_documents_apart():
    model, texts = tiny_llama(), documents()
    assert use_packed_attention(model, 64)
    batch = flattened(texts)
    told = model(**batch, use_cache=False).logits
    del batch["cu_seq_lens_q"]
    assert torch.equal(model(**batch, use_cache=False).logits, told)


def test_packed_attention_has_the_gradients_of_the_dense_mask():
    texts, gradients = documents(), []
    for packed in (False, True):
        model = tiny_llama()
        batch = flattened(texts)
        if packed:
            assert use_packed_attention(model, 64)
        else:  # transformers reads the documents off the positions and builds the mask
            del batch["cu_seq_lens_q"]
        model(**batch, use_cache=False).logits.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for dense, own in zip(*gradients, strict=True):
        torch.testing.assert_close(own, dense, rtol=1e-4, atol=1e-5)


def test_packed_attention_refuses_what_it_would_get_wrong():
    model, texts = tiny_llama(), documents()
    assert use_packed_attention(model, 64)
    with pytest.raises(ValueError, match="one flattened row"):
        model(torch.stack([texts[0], texts[0]]))
    batch = torch.zeros(2, 5, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    with pytest.raises(ValueError, match="this one is padded"):
        model(batch, attention_mask=mask)


@pytest.mark.parametrize(("window", "switched"), [(16, False), (64, True)])
def test_a_model_with_a_short_sliding_window_is_left_alone(window, switched):
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=window,
        max_window_layers=0,
    )
    model = Qwen2ForCausalLM(config)
    model.set_attn_implementation("sdpa")
    assert use_packed_attention(model, 64) is switched
    assert (model.config._attn_implementation == NAME) is switched


def test_a_model_with_another_attention_kernel_is_left_alone():
    model = tiny_llama()
    model.set_attn_implementation("eager")
    assert not use_packed_attention(model, 64)
    assert model.config._attn_implementation == "eager"


def make_trainer(tmp_path, packing=True, **settings):
    texts = documents()
    rows = [{"input_ids": t.tolist(), "labels": labels_of(t, 3).tolist()} for t in texts]
    recipe = TrainRecipe.model_validate(
        {
            "model": "tiny",
            "data": "unused.jsonl",
            "method": {"name": "lora", "lora_dropout": 0.0},
            "train": {
                "steps": 3,
                "batch_size": 2,
                "gradient_accumulation": 1,
                "max_length": 32,
                "packing": packing,
                "dtype": "fp32",
                **settings,
            },
        }
    )
    run = RunFolder(tmp_path)
    data = build.sequences(rows, recipe.train)
    return build.build_trainer(
        recipe, run, tiny_llama(), tiny_tokenizer(), data, data, Record(tmp_path, 3, 1), 3
    )


def formula(model, texts):
    """Mean negative log-likelihood per learned token, one document at a time, from the full logits."""
    losses = [
        F.cross_entropy(model(text[None]).logits[0, :-1], labels_of(text, 3)[1:], reduction="none")[2:]
        for text in texts
    ]
    return torch.cat(losses).mean()


@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_and_its_gradients_are_the_formulas(tmp_path, packing):
    made = make_trainer(tmp_path, packing)
    inputs = made.data_collator([made.train_dataset[index] for index in range(len(made.train_dataset))])
    with torch.no_grad():
        for name, parameter in made.adapted.named_parameters():
            if "lora_B" in name:  # at the start it is zero, and so are half of the gradients
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    loss = made.compute_loss(made.adapted, inputs)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in made.adapted.named_parameters() if p.requires_grad}
    made.adapted.zero_grad()
    made.adapted.get_base_model().set_attn_implementation("sdpa")
    expected = formula(made.adapted, documents())
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in made.adapted.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-7)
            assert gradients[name].abs().sum() > 0


@pytest.mark.parametrize("count", [None, 5])
def test_the_loss_is_trls(tmp_path, monkeypatch, count):
    made = make_trainer(tmp_path)
    inputs = made.data_collator([made.train_dataset[0]])
    number = None if count is None else torch.tensor(count)
    own = made.compute_loss(made.adapted, dict(inputs), num_items_in_batch=number)
    stock = SFTTrainer.compute_loss(made, made.adapted, dict(inputs), num_items_in_batch=number)
    assert own.item() == pytest.approx(stock.item(), rel=1e-6)
    monkeypatch.setattr(trainer, "LOGITS_LIMIT", 0)
    chunked = made.compute_loss(made.adapted, dict(inputs), num_items_in_batch=number)
    assert chunked.item() == stock.item()


def test_the_head_runs_on_no_position_that_is_not_learned(tmp_path):
    made = make_trainer(tmp_path)
    inputs = made.data_collator([made.train_dataset[0]])
    seen = []
    head = made.adapted.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[:-1].numel()))
    made.compute_loss(made.adapted, inputs)
    assert seen == [int((inputs["labels"][:, 1:] != -100).sum())]


def test_a_batch_without_anything_to_learn_has_loss_zero_and_a_gradient(tmp_path):
    made = make_trainer(tmp_path)
    inputs = made.data_collator([made.train_dataset[0]])
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss = made.compute_loss(made.adapted, inputs)
    loss.backward()
    assert loss.item() == 0


def test_the_held_out_loss_is_per_token_over_all_rows(tmp_path):
    made = make_trainer(tmp_path)
    measured = made.held_out_loss()
    assert made.adapted.training
    made.adapted.eval()
    made.adapted.get_base_model().set_attn_implementation("sdpa")
    assert measured == pytest.approx(formula(made.adapted, documents()).item(), rel=1e-5)


def test_weight_decay_is_on_every_adapter_parameter_and_on_nothing_else(tmp_path):
    made = make_trainer(tmp_path, weight_decay=0.25)
    made.create_optimizer()
    trainable = {id(parameter) for parameter in made.adapted.parameters() if parameter.requires_grad}
    decayed = {
        id(p)
        for group in made.optimizer.param_groups
        if group["weight_decay"] == 0.25
        for p in group["params"]
    }
    assert decayed == trainable
    assert all("lora_" in name for name, p in made.adapted.named_parameters() if p.requires_grad)


def test_epochs_are_counted_in_optimizer_steps():
    settings = {"batch_size": 2, "gradient_accumulation": 3}

    def steps(epochs, count):
        recipe = {"model": "m", "data": "d", "train": {**settings, "epochs": epochs}}
        return build.total_steps(TrainRecipe.model_validate(recipe).train, count)

    assert steps(1.0, 12) == 2
    assert steps(1.0, 13) == 3
    assert steps(2.5, 12) == 5
    assert steps(0.1, 1) == 1
