"""The penalty on KL(base ‖ adapted): its value, its gradient, and which text a step reads."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from hiplora.training.kl import KlPenalty, kl_penalty
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
        return kl_penalty(TrainRecipe.model_validate(values), tiny_llama(), tiny_tokenizer())

    assert penalty() is None
    read = penalty(kl_weight=0.5, kl_text=path, kl_pool=40, kl_tokens=40)
    assert tiny_tokenizer().decode(read.batch(0)[0]) == "abc " * 10
    sampled = penalty(kl_weight=0.5, kl_pool=500, kl_tokens=512)
    assert sum(map(len, sampled.batch(0))) >= 256
