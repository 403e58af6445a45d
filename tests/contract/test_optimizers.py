"""One rule for every optimizer: λR acts once for each step that happened, where δ is held; nothing else changes δ."""

import copy
import pickle

import peft
import pytest
import torch

import hiplora
from hiplora.errors import AdapterError, DivergedError
from hiplora.tuner import hip_layers
from tests.contract.conftest import Base, train

LEAK = 1e-6
SETTINGS = {
    "gradient": {"stability_weight": 3.0},
    "proximal": {"stability_weight": 3.0, "stability_mode": "proximal"},
    "pace": {"stability_mode": "none", "gain_lr_ratio": 2.0},
    "relative": {"stability_weight": 3.0, "relative_gains": True},
}


def moved(**changes):
    """An adapter that is not at its start."""
    torch.manual_seed(0)
    base = Base("untied")
    model = peft.get_peft_model(base.make(), base.config(**changes)).train()
    with torch.no_grad():
        for parameter in gains(model):
            parameter.copy_(torch.linspace(0.1, 0.2, parameter.numel()))
    return model


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def gains(model):
    return [p for name, p in model.named_parameters() if "hiplora_delta." in name]


def matrices(model):
    return [p for p in trainable(model) if p.dim() == 2]


def values(model):
    return torch.cat([p.detach().flatten() for p in trainable(model)])


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids).loss


class Wrapper(torch.optim.Optimizer):
    """Leaves its steps to others, after scaling the gradients in place as some do."""

    def __init__(self, *inner):
        groups = [group for one in inner for group in one.param_groups]
        super().__init__([p for group in groups for p in group["params"]], {})
        self.inner = inner

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(1.0)
        for one in self.inner:
            one.step(closure)


class Lookahead(torch.optim.Optimizer):
    """Averages slow weights with those of the optimizer inside; here the slow ones follow all the way."""

    def __init__(self, inner):
        super().__init__(inner.param_groups[0]["params"], {})
        self.inner = inner
        self.slow = [p.detach().clone() for p in self.param_groups[0]["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step(closure)
        for slow, fast in zip(self.slow, self.param_groups[0]["params"], strict=True):
            fast.copy_(slow.lerp_(fast, 1.0))


class Sam(torch.optim.Optimizer):
    """Sharpness-aware, with a perturbation of size zero."""

    def __init__(self, inner):
        super().__init__(inner.param_groups[0]["params"], {})
        self.inner = inner

    def step(self, closure):
        with torch.enable_grad():
            closure()
        self.inner.step()


class Hidden(torch.optim.Optimizer):
    """Calls the step of an optimizer that it does not have as an attribute, after scaling the gradients in place."""

    def __init__(self, inner):
        super().__init__(inner.param_groups[0]["params"], {})
        self.call = lambda: inner.step()

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.grad.mul_(1.0)
        self.call()


class Helped(torch.optim.Optimizer):
    """Steps some parameters itself, and leaves those of an optimizer inside to that."""

    def __init__(self, own, helper, rest=()):
        super().__init__([*own, *rest], {"lr": 0.1})
        self.own, self.helper = own, helper

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.own:
            parameter.sub_(parameter.grad, alpha=0.1)
        self.helper.step()


def zero_redundancy(parameters, **options):
    import torch.distributed as dist
    from torch.distributed.optim import ZeroRedundancyOptimizer

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return ZeroRedundancyOptimizer(parameters, torch.optim.SGD, **options)


def sgd(parameters, **options):
    return torch.optim.SGD(parameters, lr=0.1, **options)


@pytest.fixture(autouse=True)
def no_process_group():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


OPTIMIZERS = {
    "a wrapper": lambda model: [Wrapper(sgd(trainable(model)))],
    "a wrapper of two": lambda model: [Wrapper(sgd(matrices(model)), sgd(gains(model)))],
    "ZeRO-1": lambda model: [zero_redundancy(trainable(model), lr=0.1)],
    "Lookahead": lambda model: [Lookahead(sgd(trainable(model)))],
    "a hidden optimizer": lambda model: [Hidden(sgd(trainable(model)))],
    "a helper for the matrices": lambda model: [Helped(gains(model), sgd(matrices(model)))],
    "a helper among its own": lambda model: [Helped(gains(model), sgd(matrices(model)), matrices(model))],
    "a helper for the gains": lambda model: [Helped(matrices(model), sgd(gains(model)))],
    "one after the other": lambda model: [
        sgd(matrices(model)),
        sgd(gains(model)),
        torch.optim.SGD(gains(model), lr=0),
    ],
    "SAM": lambda model: [Sam(sgd(trainable(model)))],
    "a closure": lambda model: [sgd(trainable(model))],
    "gains first": lambda model: [sgd(gains(model)), sgd(matrices(model))],
    "matrices first": lambda model: [sgd(matrices(model)), sgd(gains(model))],
    "fused": lambda model: [sgd(trainable(model), fused=True)],
    "maximize": lambda model: [sgd(trainable(model), maximize=True)],
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_of_any_optimizer_is_one_step(ids, kind, settings):
    plain, other = moved(**SETTINGS[settings]), moved(**SETTINGS[settings])
    sign = -1 if kind == "maximize" else 1
    for model, optimizers in ((plain, [sgd(trainable(plain))]), (other, OPTIMIZERS[kind](other))):

        def closure(model=model, sign=1 if model is plain else sign):
            model.zero_grad()
            loss = sign * loss_of(model, ids)
            loss.backward()
            return loss

        closure()
        for optimizer in optimizers:
            optimizer.step(closure) if model is other and kind in ("SAM", "a closure") else optimizer.step()
    torch.testing.assert_close(values(other), values(plain))


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("how", ["fails", "is skipped", "is skipped inside a fused optimizer"])
def test_a_step_that_does_not_happen_changes_nothing(ids, how, settings):
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("out of memory")

    model = moved(**SETTINGS[settings])
    before = values(model)
    optimizer = sgd(trainable(model), fused="fused" in how)
    if how == "fails":
        loss_of(model, ids).backward()
        gradients = [p.grad.clone() for p in gains(model)]
        with pytest.raises(RuntimeError, match="out of memory"):
            Failing(trainable(model), lr=0.1).step()
        torch.testing.assert_close([p.grad for p in gains(model)], gradients, rtol=0, atol=0)
    else:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(loss_of(model, ids)).backward()
        trainable(model)[0].grad[0, 0] = float("inf")
        scaler.step(optimizer)
    torch.testing.assert_close(values(model), before, rtol=0, atol=1e-7)
    optimizer.zero_grad()
    again = moved(**SETTINGS[settings])
    for one in (model, again):  # and the next one is the first
        loss_of(one, ids).backward()
        sgd(trainable(one)).step()
    torch.testing.assert_close(values(model), values(again))


def test_a_line_search_sees_the_loss_with_the_budget(ids):
    results = []
    for mode in ("gradient", "none"):
        model = moved(stability_weight=50.0, stability_mode=mode)
        optimizer = torch.optim.LBFGS(trainable(model), max_iter=4, line_search_fn="strong_wolfe")

        def closure(model=model, optimizer=optimizer, explicit=mode == "none"):
            optimizer.zero_grad()
            loss = loss_of(model, ids) + (50.0 * hiplora.stability_penalty(model) if explicit else 0.0)
            loss.backward()
            return loss

        optimizer.step(closure)
        results.append(values(model))
        assert hiplora.max_leak(model) < LEAK
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def flat_training(model, ids, steps):
    """Train a flat copy of the parameters, as ZeRO and others do, and write it back."""
    parameters = trainable(model)
    flat = torch.nn.Parameter(torch.nn.utils.parameters_to_vector(parameters).detach().clone())
    optimizer = torch.optim.AdamW([flat], lr=1e-2)
    for _ in range(steps):
        loss_of(model, ids).backward()
        flat.grad = torch.cat([p.grad.flatten() for p in parameters])
        optimizer.step()
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(flat.detach(), parameters)
        model.zero_grad()


def test_an_optimizer_of_other_tensors_trains_the_residual_channel_all_the_same(ids, tmp_path):
    flat, usual = moved(principal_channel=False), moved(principal_channel=False)
    flat_training(flat, ids, 3)
    train(usual, ids)
    updates = [next(hip_layers(model))[1].get_delta_weight("default") for model in (flat, usual)]
    torch.testing.assert_close(*updates, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(loss_of(flat.eval(), ids), loss_of(usual.eval(), ids))
    flat.save_pretrained(tmp_path)
    assert hiplora.max_leak(peft.PeftModel.from_pretrained(Base("untied").make(), tmp_path)) < LEAK


@pytest.mark.parametrize("settings", ["gradient", "proximal", "pace"])
def test_gains_whose_price_no_hook_can_charge_are_refused_after_the_first_step(ids, settings):
    with pytest.raises(AdapterError, match=r"not the model's.*stability_mode='none'"):
        flat_training(moved(**SETTINGS[settings]), ids, 2)
    flat_training(moved(stability_mode="none"), ids, 2)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("how", ["SAM in two steps", "by hand", "by hand after each pass"])
def test_gains_may_move_before_the_first_step(ids, how, settings):
    model = moved(**SETTINGS[settings])
    optimizer = sgd(trainable(model))
    for _ in range(3):
        for amount in (0.01, -0.01):
            loss = loss_of(model, ids)
            if how.startswith("SAM"):
                loss.backward()
            with torch.no_grad():
                for parameter in gains(model):
                    parameter.add_(amount)
        if how.startswith("SAM"):
            optimizer.step()


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_fast_weights_of_inner_loops_are_not_taken_for_moved_gains(ids, settings):
    model = moved(**SETTINGS[settings])
    for _ in range(2):
        fast = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for _ in range(3):
            loss = torch.func.functional_call(model, fast, kwargs={"input_ids": ids, "labels": ids}).loss
            gradients = torch.autograd.grad(loss, list(fast.values()))
            stepped = [value - 0.1 * gradient for value, gradient in zip(fast.values(), gradients, strict=True)]
            fast = {name: one.detach().requires_grad_() for name, one in zip(fast, stepped, strict=True)}
    loss_of(model, ids).backward()
    sgd(trainable(model)).step()
    loss_of(model, ids)


@pytest.mark.parametrize("settings", ["gradient", "proximal", "pace"])
def test_gains_trained_without_an_optimizer_are_refused(ids, settings):
    model = moved(**SETTINGS[settings])
    with pytest.raises(AdapterError, match=r"not the model's.*stability_mode='none'"):
        for _ in range(3):
            loss_of(model, ids).backward()
            with torch.no_grad():
                for parameter in trainable(model):
                    parameter.sub_(parameter.grad, alpha=0.1)
                    parameter.grad = None


def test_the_average_of_a_schedule_free_optimizer_lies_in_the_complement(ids, tmp_path):
    schedulefree = pytest.importorskip("schedulefree")
    model = moved()
    optimizer = schedulefree.AdamWScheduleFree(trainable(model), lr=0.01)
    optimizer.train()
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(model, ids).backward()
        optimizer.step()
        assert hiplora.max_leak(model) < LEAK
    optimizer.eval()
    assert hiplora.max_leak(model) < 1e-5
    model.save_pretrained(tmp_path)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("gradient_projection", [True, False])
def test_a_copy_is_served_like_the_original(ids, copied, gradient_projection):
    original = moved(stability_weight=3.0, gradient_projection=gradient_projection)
    twin = copied(original)
    for model in (original, twin):
        train(model, ids)
    assert hiplora.max_leak(twin) < LEAK
    torch.testing.assert_close(values(twin), values(original), rtol=0, atol=0)


def test_an_adapter_that_rests_in_the_optimizer_keeps_every_bit(ids):
    model = moved(init_weights=False)
    model.add_adapter("resting", Base("untied").config(init_weights=False))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".resting." in name}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, ids).backward()
        optimizer.step()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert hiplora.max_leak(model) < LEAK


def test_a_step_into_nan_stops_and_names_the_layer(ids):
    model = moved()
    optimizer = sgd(trainable(model))
    (loss_of(model, ids) * float("nan")).backward()
    with pytest.raises(DivergedError, match=r"layer model\.layers\.\d.*NaN or Inf"):
        optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_ten_thousand_steps_stay_in_the_complement(optimizer):
    settings = {"preset": "paper", "r": 3, "principal_rank": 4, "lora_dropout": 0.0, "init_weights": False}
    model = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(24, 16)), hiplora.HipLoraConfig(target_modules=["0"], **settings)
    )
    x, y = torch.randn(32, 24), torch.randn(32, 16)
    stepping = optimizer(trainable(model), lr=1e-2)
    for step in range(10_000):
        stepping.zero_grad()
        (model(x[step % 29 :][:4]) - y[step % 29 :][:4]).square().mean().backward()
        stepping.step()
    assert hiplora.max_leak(model) < LEAK
