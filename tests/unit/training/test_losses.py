"""What is added to the loss or replaces it, against the formulas written out; which text a step reads."""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from peft import LoraConfig, get_peft_model

from hiplora.training import losses as module
from hiplora.training.losses import KlOnText, TokenLoss, kl_without_target, token_weights
from hiplora.training.recipe import TrainRecipe
from tests.tiny import tiny_llama, tiny_tokenizer

ROWS = [torch.arange(0, 40) * 3 % 250, torch.arange(0, 30) * 7 % 250, torch.arange(5, 45)]


def tiny_bloom():
    config = tf.BloomConfig(vocab_size=256, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)
    return tf.BloomForCausalLM(config).eval()


LOGITS = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)).double() * 3
TARGET = torch.tensor([3, 0, 39, 7, 7])


def adapted(model=None, **settings):
    return get_peft_model(
        model or tiny_llama(), LoraConfig(r=4, init_lora_weights=False, lora_dropout=0.5, **settings)
    )


@pytest.mark.parametrize("make", [tiny_llama, tiny_bloom])
def test_the_penalty_is_the_mean_divergence_per_token_of_texts_that_do_not_see_each_other(make, monkeypatch):
    monkeypatch.setattr(module, "calibration_rows", lambda *_: ROWS)
    train = {"kl_weight": 1.0, "kl_text": "its rows are given", "kl_tokens": 65}
    recipe = TrainRecipe.model_validate({"model": "m", "data": "d.jsonl", "train": train, "seed": 1})
    penalty = module.kl_penalty(recipe, bare := make(), None).value
    model, total = adapted(bare, target_modules="all-linear").eval(), 0.0
    pieces = penalty.batch(3)
    assert len(pieces) > 1
    for row in pieces:
        with torch.no_grad(), model.disable_adapter():
            p = F.log_softmax(model(row[None]).logits[0].double(), -1)
        with torch.no_grad():
            q = F.log_softmax(model(row[None]).logits[0].double(), -1)
        total += (p.exp() * (p - q)).sum().item()
    assert penalty(model.train(), 3).item() == pytest.approx(total / sum(map(len, pieces)), rel=1e-4)


def test_only_the_adapter_gets_a_gradient_and_the_model_is_left_as_it_was():
    model = adapted(modules_to_save=["lm_head"]).train()
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.requires_grad_(False)
    model.base_model.model.model.norm.eval()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    state = torch.random.get_rng_state()
    KlOnText(ROWS, 30, seed=0)(model, 0).backward()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == {name for name, flag in flags.items() if flag}


def test_every_text_is_read_once_a_pass_in_an_order_of_seed_and_step_alone():
    def read(seed):
        penalty = KlOnText([torch.tensor([row] * 8) for row in range(6)], 16, seed=seed)
        return [int(piece[0]) for step in range(6) for piece in penalty.batch(step)]

    assert [sorted(lap) for lap in (read(3)[:6], read(3)[6:])] == [list(range(6))] * 2
    assert read(3)[:6] != read(3)[6:]
    assert read(3) == read(3) != read(4)
    for tokens, lengths in ((8, [8]), (256, [256]), (300, [256, 44])):
        rows = [torch.zeros(256, dtype=torch.long)] * 5
        assert [len(piece) for piece in KlOnText(rows, tokens, seed=0).batch(7)] == lengths


def test_a_recipe_names_its_text_or_has_it_sampled(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abc " * 100, encoding="utf-8")

    def penalty(**changes):
        values = {"model": "m", "data": "d.jsonl", "method": "lora", "train": changes}
        return module.kl_penalty(TrainRecipe.model_validate(values), tiny_llama(), tiny_tokenizer())

    assert penalty() is None
    read = penalty(kl_weight=0.5, kl_text=path, kl_pool=40, kl_tokens=40)
    assert tiny_tokenizer().decode(read.value.batch(0)[0]) == "abc " * 10
    assert sum(map(len, penalty(kl_weight=0.5, kl_pool=500, kl_tokens=512).value.batch(0))) >= 256


def test_the_weights_of_tokens_are_those_of_the_papers():
    p = LOGITS.softmax(-1)
    right = [p[t, y].item() for t, y in enumerate(TARGET)]
    assert token_weights(LOGITS, TARGET, "dft").tolist() == pytest.approx(right)
    for t, weight in enumerate(token_weights(LOGITS, TARGET, "eaft").tolist()):
        top = sorted(p[t].tolist())[-20:]
        shares = [one / sum(top) for one in top]
        assert weight == pytest.approx(-sum(q * math.log(q) for q in shares) / math.log(20))


def test_the_divergence_without_the_right_token_is_that_of_what_remains():
    other = LOGITS.flip(0).requires_grad_()
    divergence = kl_without_target(LOGITS, other, TARGET)
    for t, y in enumerate(TARGET):
        p, q = (torch.cat([row[t, :y], row[t, y + 1 :]]).softmax(-1) for row in (LOGITS, other))
        assert divergence[t].item() == pytest.approx((p * (p / q).log()).sum().item())
    divergence.sum().backward()
    assert other.grad.isfinite().all()
    assert (other.grad[range(5), TARGET] == 0).all()


@pytest.mark.parametrize(("kind", "own_kl"), [("none", 0.0), ("dft", 0.0), ("eaft", 0.0), ("none", 2.0)])
def test_the_loss_of_a_batch_is_the_sum_over_its_learned_tokens(kind, own_kl):
    model, ids = adapted().eval(), ROWS[0][None, :12]
    labels = ids.clone()
    labels[:, :5] = -100
    loss = TokenLoss(kind, own_kl)(model, {"input_ids": ids, "labels": labels}, 4)
    logits, right = model(ids).logits[0, 4:-1], labels[0, 5:]
    with torch.no_grad(), model.disable_adapter():
        base = model(ids).logits[0, 4:-1]
    weights = token_weights(logits, right, kind) if kind != "none" else 1.0
    losses = F.cross_entropy(logits, right, reduction="none") * weights
    expected = (losses + own_kl * kl_without_target(base, logits, right)).sum() / 4
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_tokens_that_the_base_finds_unlikely_are_masked():
    model = tiny_llama()
    model.lm_head.weight.data *= 200  # sure of something
    sure = model(ROWS[0][None]).logits[0].argmax(-1).tolist()
    ids = [int(ROWS[0][0]), sure[0], *ROWS[0].tolist()[2:]]
    row = {"input_ids": ids, "labels": [-100, *ids[1:]]}
    chances = model(torch.tensor(ids)[None]).logits[0].softmax(-1)
    expected = [-100, *(y if chances[t, y] >= 0.4 else -100 for t, y in enumerate(ids[1:]))]
    assert module.mask_unlikely(model, [row]) == sum(label == -100 for label in expected) - 1 > 0
    assert row["labels"] == expected
