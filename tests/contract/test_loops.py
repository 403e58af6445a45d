"""Retraction and budget work by themselves, in whatever loop the user trains."""

import peft
import pytest
import torch
from datasets import Dataset

import hiplora
from hiplora.errors import AdapterError
from hiplora.spectral import budget_weights, penalty
from hiplora.tuner import hip_layers
from tests.contract.conftest import Base, train
from tests.tiny import tiny_tokenizer

LEAK = 1e-6


def parameters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def fresh(seed=0, dtype=torch.float32, **changes):
    torch.manual_seed(seed)
    base = Base("untied")
    return peft.get_peft_model(base.make(dtype), base.config(**changes))


def moved(model):
    """Whether every kind of parameter has left its starting point."""
    layers = [layer for _, layer in hip_layers(model)]
    return all(layer.hiplora_B["default"].any() and layer.hiplora_delta["default"].any() for layer in layers)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_a_bare_loop_stays_in_the_complement(base, ids, optimizer):
    model = base.adapted()
    train(model, ids, optimizer=optimizer)
    assert moved(model)
    assert hiplora.max_leak(model) < LEAK


def test_gradient_accumulation_equals_the_large_batch():
    ids = torch.randint(0, 256, (4, 10), generator=torch.Generator().manual_seed(0))
    results = []
    for parts in (1, 4):
        model = fresh(stability_weight=5.0, dtype=torch.float64)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            for part in ids.chunk(parts):
                (model(input_ids=part, labels=part).loss / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert hiplora.max_leak(model) < LEAK
        results.append(parameters(model))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-8)


def written_out(model):
    """Let the model compute s(I−P_U)BA(I−P_V) + U diag(δ)Vᵀ as it stands, of free parameters; return them by layer."""
    leaves = {}
    for name, layer in hip_layers(model):
        held = (layer.hiplora_A, layer.hiplora_B, layer.hiplora_delta)
        leaves[name] = [torch.nn.Parameter(one["default"].detach().clone()) for one in held if "default" in one]

        def forward(x, layer=layer, own=leaves[name]):
            return layer.base_layer(x) + x @ written_update(layer, *own).T

        layer.forward = forward
    return leaves


def written_update(layer, A, B, delta=None):
    factors = (layer.hiplora_U, layer.hiplora_V, layer.hiplora_shrink_U, layer.hiplora_shrink_V)
    U, V, shrink_U, shrink_V = (dict(held.items()).get("default") for held in factors)
    sides = layer.configs["default"].basis_sides
    left, right = torch.eye(len(U)), torch.eye(len(V))
    if sides != "input":
        left = left - U @ (U.T if shrink_U is None else shrink_U @ U.T)
    if sides != "output":
        right = right - V @ (V.T if shrink_V is None else shrink_V @ V.T)
    update = layer.scaling["default"] * left @ B @ A @ right
    return update if delta is None else update + U @ torch.diag(delta) @ V.T


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"preset": "function-aware"},
        {"basis": "activation", "projection": "soft"},
        {"basis": "activation", "basis_sides": "input"},
        {"r": 1, "principal_rank": 1},
        {"r": 1, "principal_rank": 0.9},
    ],
    ids=str,
)
def test_clipped_adamw_steps_are_those_of_equation_5_as_written(ids, changes):
    ours, formula = (fresh(stability_mode="none", **changes) for _ in range(2))
    leaves = written_out(formula)
    trained = {
        ours: [p for p in ours.parameters() if p.requires_grad],
        formula: [leaf for parameters_of_layer in leaves.values() for leaf in parameters_of_layer],
    }
    for model, parameters in trained.items():
        optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.1)
        for _ in range(8):
            optimizer.zero_grad()
            (model(input_ids=ids[:1], labels=ids[:1]).loss / 2).backward()
            (model(input_ids=ids[1:], labels=ids[1:]).loss / 2).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 0.1)
            optimizer.step()
    for name, layer in hip_layers(ours):
        update = written_update(layer, *leaves[name])
        assert (layer.get_delta_weight("default") - update).norm() <= 1e-5 * update.norm(), name


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_the_gradient_mode_on_sgd_equals_the_explicit_loss_of_equation_7(ids, gamma):
    weight, rate = 7.0, 0.3
    implicit = fresh(stability_weight=weight, stability_gamma=gamma)
    train(implicit, ids, steps=4, lr=rate, optimizer=torch.optim.SGD)

    explicit = fresh(stability_mode="none")
    trainable = [p for p in explicit.parameters() if p.requires_grad]
    for _ in range(4):
        loss = explicit(input_ids=ids, labels=ids).loss
        for _, layer in hip_layers(explicit):
            weights = budget_weights(layer.hiplora_sigma["default"], gamma)
            loss = loss + weight * penalty(layer.hiplora_delta["default"], weights)
        loss.backward()
        with torch.no_grad():
            for p in trainable:
                p -= rate * p.grad
                p.grad = None
        hiplora.retract_(explicit)
    torch.testing.assert_close(parameters(implicit), parameters(explicit), rtol=1e-5, atol=1e-7)


def test_the_penalty_helper_is_equation_6_summed_over_modules():
    model = fresh(init_weights=False, stability_gamma=2.0)
    expected = 0.0
    for _, layer in hip_layers(model):
        sigma, delta = layer.hiplora_sigma["default"].double(), layer.hiplora_delta["default"].detach().double()
        expected += float((sigma**2 / (sigma**2).sum() * delta**2).sum())
    value = hiplora.stability_penalty(model)
    assert value.item() == pytest.approx(expected, rel=1e-6)
    value.backward()
    assert all(layer.hiplora_delta["default"].grad is not None for _, layer in hip_layers(model))
    with pytest.raises(AdapterError, match="principal channel"):
        hiplora.stability_penalty(fresh(principal_channel=False))


def test_a_scaled_loss_gives_the_same_step_as_an_unscaled_one(ids):
    results = []
    for scale in (None, 64.0):
        model = fresh(stability_weight=7.0)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for _ in range(3):
            scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append(parameters(model))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_trls_sft_trainer_takes_the_config_as_it_is(tmp_path, checkpointing):
    from trl import SFTConfig, SFTTrainer

    base = Base("untied")
    settings = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True}
    settings |= {"max_steps": 3, "save_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    config = SFTConfig(**settings, save_strategy="steps", gradient_checkpointing=checkpointing, max_length=32)
    data = Dataset.from_list([{"text": f"line {i} of the text"} for i in range(12)])
    options = {"processing_class": tiny_tokenizer(), "peft_config": base.config()}
    trainer = SFTTrainer(base.make(), args=config, train_dataset=data, **options)
    trainer.train()
    assert moved(trainer.model)
    assert hiplora.max_leak(trainer.model) < LEAK
    peft.PeftModel.from_pretrained(base.make(), tmp_path / "checkpoint-3")


def test_a_resumed_run_equals_the_uninterrupted_one_step_for_step(tmp_path):
    from transformers import Trainer, TrainingArguments

    ids = torch.randint(0, 256, (16, 8), generator=torch.Generator().manual_seed(5)).tolist()
    rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])
    settings = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "save_steps": 2}
    settings |= {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2}

    def trainer(folder):
        model = fresh(lora_dropout=0.1, stability_weight=3.0)
        return Trainer(model, TrainingArguments(str(folder), **settings), train_dataset=rows)

    whole = trainer(tmp_path / "whole")
    whole.train()
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    torch.testing.assert_close(parameters(resumed.model), parameters(whole.model), rtol=0, atol=0)
    assert moved(whole.model)
    assert hiplora.max_leak(whole.model) < LEAK
    losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (whole, resumed)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_the_gains_own_learning_rate_is_that_of_a_group_of_their_own(ids, optimizer):
    ours, grouped = fresh(gain_lr_ratio=7.0, stability_weight=3.0), fresh(stability_weight=3.0)
    train(ours, ids, steps=3, lr=0.01, optimizer=optimizer)
    gains = [p for name, p in grouped.named_parameters() if "delta" in name]
    rest = [p for name, p in grouped.named_parameters() if p.requires_grad and "delta" not in name]
    own = optimizer([{"params": rest}, {"params": gains, "lr": 0.07}], lr=0.01)
    train(grouped, ids, steps=3, optimizer=lambda parameters, lr: own)
    torch.testing.assert_close(parameters(ours), parameters(grouped))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_relative_gains_are_those_of_a_model_that_trains_rho(ids, optimizer):
    rate = 0.02
    double = {"principal_rank": 4, "dtype": torch.float64}
    ours = fresh(relative_gains=True, gain_lr_ratio=3.0, stability_weight=2.0, **double)
    theirs = fresh(stability_mode="none", **double)
    train(ours, ids, lr=rate, optimizer=optimizer)
    rho, sigma = {}, {name: layer.hiplora_sigma["default"] for name, layer in hip_layers(theirs)}
    for name, layer in hip_layers(theirs):
        delta = layer.hiplora_delta["default"]
        rho[name] = torch.nn.Parameter(torch.zeros_like(delta))
        delta.requires_grad_(False)
    rest = [p for p in theirs.parameters() if p.requires_grad]
    own = optimizer([{"params": rest}, {"params": list(rho.values()), "lr": 3 * rate}], lr=rate)
    for _ in range(3):
        own.zero_grad()
        for name, layer in hip_layers(theirs):
            layer.hiplora_delta["default"].data.copy_(rho[name].data * sigma[name])
            layer.hiplora_delta["default"].requires_grad_(True)
        theirs(input_ids=ids, labels=ids).loss.backward()
        for name, layer in hip_layers(theirs):
            delta = layer.hiplora_delta["default"]
            budget = 2 * 2.0 * budget_weights(sigma[name], 1.0) * delta.detach()
            rho[name].grad = (delta.grad + budget) * sigma[name]
            delta.grad = None
            delta.requires_grad_(False)
        own.step()
    for (name, mine), (_, other) in zip(hip_layers(ours), hip_layers(theirs), strict=True):
        torch.testing.assert_close(mine.gains("default"), rho[name] * sigma[name], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(mine.hiplora_B["default"], other.hiplora_B["default"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("relative", [False, True])
def test_the_proximal_mode_shrinks_each_gain_after_the_step_in_its_own_units(ids, relative):
    plain = fresh(stability_mode="none", relative_gains=relative)
    shrunk = fresh(stability_mode="proximal", stability_weight=5.0, relative_gains=relative)
    for model in (plain, shrunk):
        train(model, ids, steps=1, lr=0.1, optimizer=torch.optim.SGD)
    for (_, a), (_, b) in zip(hip_layers(plain), hip_layers(shrunk), strict=True):
        sigma = a.hiplora_sigma["default"]
        factor = 1 + 2 * 0.1 * 5.0 * budget_weights(sigma, 1.0) * (sigma**2 if relative else 1.0)
        torch.testing.assert_close(b.hiplora_delta["default"], a.hiplora_delta["default"] / factor)
