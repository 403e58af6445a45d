"""The fused layer against the dense formula, in every precision and execution mode that PEFT's users use."""

import io

import jaxtyping
import peft
import pytest
import torch

import hiplora
from hiplora import HipLoraConfig
from hiplora.errors import ConfigError
from hiplora.tuner import hip_layers
from hiplora.tuner.functional import add_channels, keep_mask
from tests.contract.conftest import logits, train


def layer_case(dtype=torch.float64, m=6, n=9, r=3, k=2):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "base_out": draw(4, 5, m),
        "x": draw(4, 5, n),
        "A": draw(r, n),
        "B": draw(m, r),
        "delta": draw(k),
        "U": torch.linalg.qr(draw(m, k).double()).Q.to(dtype),
        "V": torch.linalg.qr(draw(n, k).double()).Q.to(dtype),
    }


def dense(base_out, x, A, B, delta, U, V, scaling, mask=1.0):
    """Eq. 1, 2 and 5 with every matrix written out."""
    principal = 0 if delta is None else x @ (U @ torch.diag(delta) @ V.T).T
    return base_out + (x * mask) @ (scaling * B @ A).T + principal


@pytest.mark.parametrize("gains", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_output_and_gradients_equal_the_dense_formula_with_dropout_on_the_residual_channels_input_only(gains, dropout):
    case = layer_case()
    if not gains:
        case["delta"] = None
    leaves = [case[n].requires_grad_() for n in ("base_out", "x", "A", "B", "delta") if case[n] is not None]
    weight = torch.randn(4, 5, 6, dtype=torch.float64)
    torch.manual_seed(7)
    output = add_channels(**case, scaling=2.0, dropout=dropout)
    torch.manual_seed(7)
    mask, keep = keep_mask(torch.Size((20, 9)), dropout, torch.device("cpu"))
    expected = dense(**case, scaling=2.0, mask=mask.view(4, 5, 9) / keep if dropout else 1.0)
    torch.testing.assert_close(output, expected)
    gradients, expected_gradients = (torch.autograd.grad((one * weight).sum(), leaves) for one in (output, expected))
    torch.testing.assert_close(gradients, expected_gradients)


@pytest.mark.parametrize("dropout", [0.05, 0.5, 1e-6, 0.999])
def test_the_mask_drops_as_often_as_it_says(dropout):
    mask, keep = keep_mask(torch.Size((1000, 1000)), dropout, torch.device("cpu"))
    assert keep == pytest.approx(1 - dropout, abs=1 / 65536)
    assert mask.float().mean().item() == pytest.approx(keep, abs=4 * (keep * (1 - keep) / 1e6) ** 0.5 + 1e-9)


@pytest.mark.parametrize(("dtype", "own"), [("bfloat16", "float32"), ("float16", "float32"), ("bfloat16", "bfloat16")])
def test_half_precision_bases_have_fp32_factors_and_adapters_as_asked(base, ids, dtype, own):
    if base.kind == "smollm2" and dtype == "float16":
        pytest.skip("the real model takes long in half precision on a CPU: one kind is enough")
    dtype, own = getattr(torch, dtype), getattr(torch, own)
    model = peft.get_peft_model(base.make(dtype), base.config(), autocast_adapter_dtype=own == torch.float32)
    for _, layer in hip_layers(model):
        assert layer.hiplora_A["default"].dtype == own
        assert layer.hiplora_U["default"].dtype == torch.float32
        assert layer.get_base_layer().weight.dtype == dtype
    assert torch.equal(logits(model, ids), logits(base.make(dtype), ids))
    losses = train(model, ids)
    assert losses[-1] < losses[0]
    assert logits(model, ids).dtype == dtype


def test_autocast_trains_and_agrees_with_full_precision(base, ids):
    model = base.adapted(init_weights=False)
    with torch.no_grad():
        exact = model(input_ids=ids, labels=ids).loss
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model(input_ids=ids, labels=ids).loss
    assert rough.item() == pytest.approx(exact.item(), rel=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=ids, labels=ids).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in grads.values())


def test_a_merge_inside_autocast_is_as_exact_as_outside(base, ids):
    model = base.adapted(init_weights=False)
    model(input_ids=ids)  # it might be a pass of a training: from now on A and B act through the projection
    for _, layer in hip_layers(model):
        exact = layer.get_delta_weight("default")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer.get_delta_weight("default"), exact)


def test_an_adapter_is_made_and_loaded_inside_autocast_as_exactly_as_outside(base, ids, tmp_path):
    base.adapted(init_weights=False).save_pretrained(tmp_path)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = base.adapted(init_weights=False)
        loaded = peft.PeftModel.from_pretrained(base.make(), tmp_path)
    assert hiplora.max_leak(made) < 1e-6
    assert hiplora.max_leak(loaded) < 1e-6


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(base, ids, reentrant):
    def gradients(checkpointing):
        torch.manual_seed(1)
        model = base.adapted(init_weights=False, lora_dropout=0.2)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        torch.manual_seed(2)
        model(input_ids=ids, labels=ids).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    torch.testing.assert_close(gradients(True), gradients(False))


@pytest.mark.slow
def test_torch_compile_gives_the_same_output_and_gradients(tiny, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' shape checks cannot be traced
    model = tiny.adapted(init_weights=False)
    _, layer = next(iter(hip_layers(model)))
    x = torch.randn(2, 7, layer.in_features)
    compiled = torch.compile(layer, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))

    def gradients(run):
        layer.zero_grad()
        run(x).square().mean().backward()
        return {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}

    torch.testing.assert_close(gradients(compiled), gradients(layer))


@pytest.mark.slow
def test_a_compiled_layer_is_not_compiled_again_after_the_first_step(tiny, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' shape checks cannot be traced
    _, layer = next(iter(hip_layers(tiny.adapted())))
    optimizer, graphs = torch.optim.SGD(layer.parameters(), lr=0.1), []
    compiled = torch.compile(layer, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for _ in range(3):
        compiled(torch.randn(3, layer.in_features)).sum().backward()
        optimizer.step()
    assert len(graphs) == 1


def test_the_linear_layer_alone_saves_no_more_than_its_input_and_the_thin_activation():
    case = layer_case(torch.float32, m=64, n=64, r=2, k=2)
    case["base_out"], case["x"] = torch.randn(32, 64), torch.randn(32, 64)
    for name in ("x", "A", "B", "delta"):
        case[name].requires_grad_()
    owned = {tensor.data_ptr() for tensor in case.values()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        add_channels(**case, scaling=1.0, dropout=0.0)
    extra = sum(t.numel() for t in saved if t.data_ptr() not in owned)
    assert extra == 32 * (2 + 2)


class AddsInPlace(torch.nn.Module):
    """A block that changes a projection's output in place, as Falcon and Gemma-3n do."""

    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Linear(8, 8)

    def forward(self, x):
        y = self.proj(x)
        y += x
        return y


def small(base, *targets, **changes):
    settings = {"preset": "paper", "r": 2, "principal_rank": 2, "lora_dropout": 0.0, "init_weights": False, **changes}
    return peft.get_peft_model(base, HipLoraConfig(target_modules=list(targets), **settings))


@pytest.mark.parametrize("sides", [None, "both", "input"])
@pytest.mark.parametrize("gains", [True, False])
def test_gradients_can_be_differentiated_themselves_and_batched(gains, sides):
    case = layer_case()
    case["delta"] = case["delta"] if gains else None
    fixed = {name: case.pop(name) for name in ("U", "V")}
    names = [name for name, value in case.items() if value is not None]

    def run(*values):
        torch.manual_seed(0)
        given = {**dict.fromkeys(case), **dict(zip(names, values, strict=True)), **fixed}
        return add_channels(**given, scaling=1.5, dropout=0.4, sides=sides)

    given = tuple(case[name].requires_grad_() for name in names)
    assert torch.autograd.gradgradcheck(run, given)
    once = torch.autograd.grad(run(*given).square().sum(), given)
    torch.testing.assert_close(torch.autograd.grad(run(*given).square().sum(), given, create_graph=True), once)
    one_by_one, batched = (
        torch.autograd.functional.jacobian(lambda *values: run(*values).sum((0, 1)), given, vectorize=vectorize)
        for vectorize in (False, True)
    )
    torch.testing.assert_close(batched, one_by_one)


class ASum(torch.nn.Module):
    """A model with one output a row."""

    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.proj(x).square().sum(-1)


@pytest.mark.parametrize("gains", [True, False])
def test_torch_func_and_traces_see_what_a_pass_computes(gains):
    model = small(ASum(), "proj", principal_channel=gains)
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    rows = torch.randn(3, 8)
    with torch.no_grad():
        traced = torch.jit.trace(model.eval(), rows)
    torch.jit.save(traced, file := io.BytesIO())
    torch.testing.assert_close(torch.jit.load(io.BytesIO(file.getvalue()))(rows), model(rows))
    model.train()
    each = torch.func.vmap(
        torch.func.grad(lambda given, row: torch.func.functional_call(model, given, row)), in_dims=(None, 0)
    )(parameters, rows)
    for index, row in enumerate(rows):
        model.zero_grad()
        model(row).backward()
        for name, gradients in each.items():
            torch.testing.assert_close(model.get_parameter(name).grad, gradients[index])


@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8)])
def test_the_output_may_be_changed_in_place(shape):
    model = small(AddsInPlace(), "proj")
    model(torch.randn(shape)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_torchs_encoder_calls_its_adapted_layers_in_evaluation_too():
    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 1)
    model = small(encoder, "linear1", "linear2")
    x, padding = torch.randn(2, 3, 8), torch.tensor([[False, False, True], [False, False, False]])
    for mask in (None, padding):
        trained = model.train()(x, src_key_padding_mask=mask)
        with torch.no_grad():
            evaluated = model.eval()(x, src_key_padding_mask=mask)
            torch.testing.assert_close(evaluated, trained.detach())
            with model.disable_adapter():
                assert not torch.allclose(model(x, src_key_padding_mask=mask), evaluated)
    with pytest.raises(ConfigError, match=r"self_attn\.out_proj"):
        small(torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), "out_proj")
