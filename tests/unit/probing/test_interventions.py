import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hiplora.errors import ConfigError
from hiplora.probing import Intervention, directions_of, intervened
from tiny import tiny_llama

NAME = "model.layers.1.self_attn.k_proj"


def one(model, name=NAME, index=3):
    return next(d for d in directions_of(model, [name], 32, "even") if d.index == index)


def component(weight, index):
    U, sigma, Vt = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    return sigma[index] * torch.outer(U[:, index], Vt[index])


@pytest.mark.parametrize(("name", "factor"), [("zero", -1.0), ("flip", -2.0), ("noise_0.1", 0.1 * 1.5)])
def test_an_intervention_adds_its_multiple_of_one_singular_component(name, factor):
    model = tiny_llama()
    weight = model.get_submodule(NAME).weight
    expected = weight.detach().double() + factor * component(weight, 3)
    with intervened(model, one(model), Intervention.parse(name).factor(1.5)) as changed:
        torch.testing.assert_close(
            changed.get_submodule(NAME).weight.detach().double(), expected, atol=1e-7, rtol=0
        )


def test_zero_takes_a_direction_out_of_the_spectrum_and_flip_leaves_the_spectrum():
    model = tiny_llama()
    module, direction = model.get_submodule(NAME), one(model, index=0)
    before = torch.linalg.svdvals(module.weight)
    with intervened(model, direction, -1.0):
        after = torch.linalg.svdvals(module.weight)
    torch.testing.assert_close(after[:-1], before[1:], atol=1e-6, rtol=0)
    with intervened(model, direction, -2.0):
        torch.testing.assert_close(torch.linalg.svdvals(module.weight), before, atol=1e-6, rtol=0)


def test_the_very_same_weight_is_back_also_after_an_error():
    model = tiny_llama()
    module, direction = model.get_submodule(NAME), one(model)
    weight, bits, flag = module.weight, module.weight.detach().clone(), module.weight.requires_grad
    with pytest.raises(RuntimeError, match="boom"), intervened(model, direction, -1.0):
        assert module.weight is not weight
        raise RuntimeError("boom")
    assert module.weight is weight
    assert torch.equal(weight, bits)
    assert weight.requires_grad is flag


def test_a_tied_weight_leaves_the_other_alone():
    model = tiny_llama(tie=True)
    embedded = model.get_input_embeddings().weight
    bits = embedded.detach().clone()
    with intervened(model, one(model, "lm_head", 0), -1.0):
        assert model.get_input_embeddings().weight is embedded
        assert not torch.equal(model.lm_head.weight, bits)
    assert model.lm_head.weight is embedded
    assert torch.equal(embedded, bits)


def test_a_transposed_layer_is_changed_the_same_way():
    linear, conv = nn.Linear(12, 8, bias=False), Conv1D(8, 12)
    conv.weight = nn.Parameter(linear.weight.detach().T.clone())
    models = {"linear": nn.ModuleDict({"a": linear}), "conv": nn.ModuleDict({"a": conv})}
    inputs, outputs = torch.randn(5, 12), {}
    for name, model in models.items():
        (direction,) = directions_of(model, ["a"], 1)
        assert (direction.u.shape, direction.v.shape) == ((8,), (12,))
        with intervened(model, direction, -1.0):
            outputs[name] = model["a"](inputs)
    torch.testing.assert_close(outputs["linear"], outputs["conv"])
    assert not torch.allclose(outputs["linear"], linear(inputs))


def test_a_half_precision_weight_is_rounded_once():
    model = tiny_llama(dtype=torch.bfloat16)
    module, direction = model.get_submodule(NAME), one(model)
    wide = module.weight.detach().float() - direction.sigma * torch.outer(direction.u, direction.v)
    with intervened(model, direction, -1.0):
        assert module.weight.dtype == torch.bfloat16
        assert (module.weight.float() - wide).abs().max() <= wide.abs().max() * 2**-8


def test_names_go_there_and_back():
    assert [Intervention.parse(name).name for name in ("zero", "flip", "noise_0.1", "noise_0.25")] == [
        "zero",
        "flip",
        "noise_0.1",
        "noise_0.25",
    ]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("drop", "'drop': expected zero, flip"),
        ("noise", "scale 0.0: expected a number > 0"),
        ("noise_-1", "expected a number > 0"),
        ("noise_inf", "expected a number > 0"),
        ("noise_x", "noise_S as noise_0.1"),
        ("zero_2", "takes no scale"),
    ],
)
def test_what_is_no_intervention_is_refused(name, said):
    with pytest.raises(ConfigError, match=said):
        Intervention.parse(name)


def test_a_direction_of_another_model_is_refused_before_anything_is_changed():
    model = tiny_llama()
    weight = model.get_submodule(NAME).weight
    other = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([nn.Identity(), nn.Module()])})})
    other["model"]["layers"][1].self_attn = nn.ModuleDict({"k_proj": nn.Linear(7, 5)})
    (direction,) = directions_of(other, [NAME], 1)
    with (
        pytest.raises(ConfigError, match=rf"{NAME}: the weight is \(32, 64\), the direction is for \(5, 7\)"),
        intervened(model, direction, -1.0),
    ):
        pass
    assert model.get_submodule(NAME).weight is weight


@pytest.mark.parametrize(
    ("name", "said"),
    [("model.layers.9.x", "no layer"), ("model.norm", "is a LlamaRMSNorm; directions are of linear")],
)
def test_what_is_no_linear_layer_is_refused(name, said):
    with pytest.raises(ConfigError, match=said):
        list(directions_of(tiny_llama(), [name], 1))
