"""Verify an export: per module in factor space, and by the logits of the model that carries it."""

import copy
import os
from collections.abc import Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn

from hiplora.adapters.base import (
    BaseWeights,
    check_base,
    is_product,
    is_transposed,
    linear_layer,
    quiet_loading,
    replace_extras,
)
from hiplora.adapters.folder import PREFIX
from hiplora.adapters.update import AdapterUpdate, model_order, product_norm
from hiplora.errors import AdapterError, first_line
from hiplora.models import resolve
from hiplora.tuner.experts import ALIASES, stacks, unrolled
from hiplora.tuner.targets import short_names

TOLERANCE = 1e-5  # of a module's update, relative, before it is rounded
_LOGIT_TOLERANCE = 1e-3  # logits pass through every layer


def compare_modules(update: AdapterUpdate, written: AdapterUpdate) -> dict[str, float]:
    """Return ‖ΔW' − ΔW‖/‖ΔW‖ (Frobenius) per module, in float64; 0 where both are zero, infinite where only ΔW is."""
    if unmatched := set(update.factors) ^ set(written.factors):
        raise AdapterError(f"layer {min(unmatched)}: was read or written, but not both; nothing was exported")
    differences = {}
    for module in update.factors:
        (A, B), (A_written, B_written) = update.factors[module], written.factors[module]
        norm = product_norm(B, A)
        error = product_norm(torch.cat([B_written, -B], dim=1), torch.cat([A_written, A]))
        differences[module] = error / norm if norm else (float("inf") if error else 0.0)
    return differences


def refuse_over(differences: Mapping[str, float], tolerance: float = TOLERANCE) -> None:
    """Raise AdapterError, naming the module that differs most, if it differs by more than the tolerance."""
    module, worst = max(differences.items(), key=lambda item: item[1])
    if not worst <= tolerance:
        raise AdapterError(
            f"layer {module}: the exported update differs by {worst:.1e} of its norm, more than the tolerance "
            f"{tolerance:.0e}; nothing was written"
        )


def compare_logits(update: AdapterUpdate, folder: Path, exact: bool, device: str) -> tuple[float | None, str]:
    """Return `logit_difference` of an update beside its base's layers and its export, loaded by stock PEFT.

    If they were not compared, None and the reason.
    """
    if not os.path.isdir(resolve(update.base)):
        return None, f"logits not compared: base model {update.base or '?'} is not a folder here; pass base=… (--base)"
    weights = BaseWeights.of(update)
    if not weights.predicts_tokens:
        return None, f"logits not compared: {type(weights.skeleton).__name__} gives none of tokens"
    if problem := weights.no_room(device, torch.float32):
        return None, f"logits not compared: {problem}"
    base: Any = weights.load(device, torch.float32)
    check_base(base, update, update.base)
    replace_extras(base, update)
    with added(base, update):
        expected = logits_of(base)
    with quiet_loading():
        if update.extras:
            vocabulary = len(base.get_input_embeddings().weight)
            del base
            base = weights.load(device, torch.float32)
            if len(base.get_input_embeddings().weight) != vocabulary:
                base.resize_token_embeddings(vocabulary, mean_resizing=False)
        stock = PeftModel.from_pretrained(base, str(folder)).eval()
    return logit_difference(logits_of(stock), expected, update.source, exact), ""


def _targets(update: AdapterUpdate, model: nn.Module | None, weights: Container[str] = ()) -> dict[str, Any]:
    """Return the fields of a stock LoRA that adapts an update's modules, by name, over a `model` if there is one.

    Experts are parameters, and so are the weights of the layers among `weights`.
    """
    stacked = stacks(update.factors)
    layers = {name for name, (_, modules) in stacked.items() if modules == [name]}
    parameters = {*(stacked.keys() - layers), *(f"{name}.weight" for name in layers if name in weights)}
    return {
        "target_modules": sorted(name for name in layers if name not in weights),
        "target_parameters": sorted(parameters) or None,
        "fan_in_fan_out": is_transposed(update, model) and not parameters,  # PEFT finds a parameter's layout itself
    }


def stock_targets(update: AdapterUpdate, skeleton: nn.Module | None) -> dict[str, Any]:
    """Return `_targets` with which stock PEFT adapts an update's modules, and no others, tried on a `skeleton`, if any.

    AdapterError if the base has no such layer, or PEFT rewrites the configuration whatever it says, as it does over
    some mixtures of experts.
    """
    targets = _targets(update, skeleton)
    if skeleton is None:
        return targets
    with unrolled(skeleton):
        for module in update.modules:
            linear_layer(skeleton, module, update.base)
    layers = targets["target_modules"]
    # PEFT takes a layer with such a name for the experts', also outside them, and adapts a router only as a parameter.
    experts = {alias for aliases in ALIASES.values() for alias in aliases}
    by_weight = [n for n in layers if n.rpartition(".")[2] in experts or not is_product(skeleton.get_submodule(n))]
    if targets["target_parameters"] is None:
        targets["target_modules"] = short_names(skeleton, layers)
    for candidate in (targets, _targets(update, skeleton, by_weight)):
        try:
            with quiet_loading(), torch.device("meta"):
                model = PeftModel(copy.deepcopy(skeleton), LoraConfig(r=1, **candidate))
        except (ValueError, NotImplementedError) as error:
            why = first_line(error)
            continue
        adapted = set(_adapted(model, candidate["target_parameters"] or ()))
        if adapted == set(update.modules):
            return candidate
        wrong = sorted(adapted ^ set(update.modules), key=model_order)
        verb = "does not adapt" if wrong[0] in update.factors else "adapts"
        why = f"{verb} {wrong[0]}" + (f" and {len(wrong) - 1} more are wrong" if wrong[1:] else "")
    raise AdapterError(
        f"{update.source}: stock PEFT {peft.__version__} cannot have exactly these modules of the base model ({why}); "
        "export with --to dense, or train other modules, of a mixture's experts all or none"
    )


def skeleton_of(update: AdapterUpdate, model: nn.Module | None) -> nn.Module | None:
    """Return the base model, or that of a live `model`, without weights; None if it is not available."""
    try:
        if model is None:
            return BaseWeights.of(update).skeleton
        inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        with torch.device("meta"):
            return type(inner)._from_config(copy.deepcopy(inner.config))
    except (AdapterError, AttributeError):  # no such folder; or no model of transformers
        return None


def _adapted(model: nn.Module, parameters: Container[str]) -> Iterator[str]:
    """Yield the layers that a stock LoRA adapts, experts one by one.

    A layer that it adapts through its weight, although that is not among `parameters`, is named as the weight.
    """
    for name, layer in model.named_modules():
        plain = name.removeprefix(PREFIX).replace(".base_layer", "")
        if isinstance(layer, ParamWrapper) and layer.parameter_name == "weight":
            yield plain if (weight := f"{plain}.weight") in parameters else weight
        elif isinstance(layer, ParamWrapper):
            yield from (f"{plain}.{layer.parameter_name}.{expert}" for expert in range(layer.num_experts))
        elif isinstance(layer, LoraLayer) and len(layer.lora_A):  # an embedding has other factors
            yield plain


def logit_difference(logits: Tensor, expected: Tensor, source: str, exact: bool) -> float:
    """Return the largest difference of logits in units of the largest; AdapterError if too large for `exact`."""
    difference = ((logits - expected).abs().max() / expected.abs().max()).item()
    if exact and not difference <= _LOGIT_TOLERANCE:
        raise AdapterError(
            f"{source}: the exported logits differ by {difference:.1e} of the largest one, more than "
            f"{_LOGIT_TOLERANCE:.0e}; nothing was written"
        )
    return difference


@torch.no_grad()
def logits_of(model: nn.Module) -> Float[Tensor, "prompts length vocabulary"]:
    """Return a language model's logits on four rows of random tokens, the same each time, in fp32."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(20240131)
    ids = torch.randint(0, config.get_text_config().vocab_size, (4, 16), generator=generator)
    ids = ids.to(next(model.parameters()).device)
    decoder_inputs = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
    return model(input_ids=ids, **decoder_inputs).logits.float().cpu()


@contextmanager
def added(model: nn.Module, update: AdapterUpdate) -> Iterator[None]:
    """Add an update beside a bare model's layers inside the block, as an adapter does; to the weights of a router."""

    def hook(A: Tensor, B: Tensor) -> Any:
        return lambda _, inputs, output: output + ((inputs[0].float() @ A.T) @ B.T).to(output.dtype)

    with ExitStack() as stack:
        stack.enter_context(unrolled(model))
        device = next(model.parameters()).device
        for module, (A, B) in update.factors.items():
            layer: Any = model.get_submodule(module)
            if is_product(layer):
                stack.callback(layer.register_forward_hook(hook(A.to(device), B.to(device))).remove)
            else:
                stack.callback(setattr, layer, "weight", layer.weight)
                total = layer.weight.detach().float() + update.delta(module).to(device)
                layer.weight = nn.Parameter(total.to(layer.weight.dtype), requires_grad=False)
        yield
