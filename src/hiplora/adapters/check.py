"""Verify an export: per module in factor space, and by the logits of the model that carries it."""

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn

from hiplora.adapters.base import BaseWeights, check_base, linear_layer, quiet_loading, replace_extras
from hiplora.adapters.read import PREFIX
from hiplora.adapters.update import SELECTION, AdapterUpdate, model_order, product_norm
from hiplora.errors import AdapterError, first_line
from hiplora.models import resolve
from hiplora.tuner.experts import stacks, unrolled

TOLERANCE = 1e-5  # of a module's update, relative, before it is rounded
_LOGIT_TOLERANCE = 1e-3  # logits pass through every layer


def compare_modules(update: AdapterUpdate, written: AdapterUpdate) -> dict[str, float]:
    """Return ‖ΔW' − ΔW‖/‖ΔW‖ (Frobenius) per module, in float64; 0 where both are zero, infinite where only ΔW is."""
    if missing := set(update.factors) ^ set(written.factors):
        raise AdapterError(f"layer {min(missing)}: was read or written, but not both; nothing was exported")
    differences = {}
    for module in update.factors:
        (A, B), (A_written, B_written) = update.factors[module], written.factors[module]
        norm = product_norm(B, A)
        error = product_norm(torch.cat([B_written, -B], dim=1), torch.cat([A_written, A]))
        differences[module] = error / norm if norm else (float("inf") if error else 0.0)
    return differences


def refuse_over(differences: Mapping[str, float], tolerance: float) -> None:
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
    if why := weights.no_room(device, torch.float32):
        return None, f"logits not compared: {why}"
    bare: Any = weights.load(device, torch.float32)
    check_base(bare, update, update.base)
    replace_extras(bare, update)
    with added(bare, update):
        expected = logits_of(bare)
    with quiet_loading():
        if update.extras:
            bare, rows = weights.load(device, torch.float32), len(bare.get_input_embeddings().weight)
            if rows != len(bare.get_input_embeddings().weight):
                bare.resize_token_embeddings(rows, mean_resizing=False)
        stock = PeftModel.from_pretrained(bare, str(folder)).eval()
    return logit_difference(logits_of(stock), expected, update.source, exact), ""


def loadable(update: AdapterUpdate, fields: Mapping[str, Any], model: nn.Module | None = None) -> AdapterUpdate:
    """Return an update whose configuration makes stock PEFT adapt the modules that it has, and no others.

    Tried on the skeleton of the base model, if that is at hand, or of the live `model` that has the adapter: with
    `fields`, and with all modules by name.

    Raises:
        AdapterError: the base has no such layer, or PEFT rewrites the configuration whatever it says, as it does over
            some mixtures of experts.
    """
    layers = sorted(name for name, (_, modules) in stacks(update.factors).items() if modules == [name])
    by_name = dict.fromkeys(SELECTION) | {"target_modules": layers}
    for selection in (fields, {**fields, **by_name}):
        if (skeleton := _skeleton(update, model)) is None:
            return update
        why = ""
        try:
            with quiet_loading(), torch.device("meta"):
                adapted = PeftModel(skeleton, LoraConfig(r=1, **selection))
        except (ValueError, NotImplementedError) as error:
            why = first_line(error)
        else:
            if (found := set(_adapted(adapted))) == set(update.modules):
                return replace(update, config={**update.config, **{key: selection.get(key) for key in by_name}})
    if not why:
        wrong = sorted(found ^ set(update.modules), key=model_order)
        told = "does not adapt" if wrong[0] in update.factors else "adapts"
        why = f"{told} {wrong[0]}" + (f" and {len(wrong) - 1} more are wrong" if wrong[1:] else "")
    raise AdapterError(
        f"{update.source}: stock PEFT {peft.__version__} cannot have exactly these modules of the base model ({why}): "
        "over some mixtures of experts it rewrites gate_proj, up_proj and down_proj outside the experts; export with "
        "--to dense, or train without those modules (exclude_modules)"
    )


def _skeleton(update: AdapterUpdate, model: nn.Module | None) -> nn.Module | None:
    """Return the base model without weights; None if it is not at hand; AdapterError if it lacks an adapted layer."""
    try:
        if model is None:
            skeleton: nn.Module = BaseWeights.of(update).skeleton
        else:
            inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
            with torch.device("meta"):
                skeleton = type(inner)._from_config(copy.deepcopy(inner.config))
    except (AdapterError, AttributeError):  # no such folder; or no model of transformers
        return None
    with unrolled(skeleton):
        for module in update.modules:
            linear_layer(skeleton, module, update.base)
    return skeleton


def _adapted(model: nn.Module) -> Iterator[str]:
    """Yield the layers that a stock LoRA adapts, experts one by one."""
    for name, layer in model.named_modules():
        plain = name.removeprefix(PREFIX).replace(".base_layer", "")
        if isinstance(layer, ParamWrapper):
            yield from (f"{plain}.{layer.parameter_name}.{expert}" for expert in range(layer.num_experts))
        elif isinstance(layer, LoraLayer):
            yield plain


def logit_difference(found: Tensor, expected: Tensor, source: str, exact: bool) -> float:
    """Return the largest difference of logits in units of the largest; AdapterError if too large for `exact`."""
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
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
    also = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
    return model(input_ids=ids, **also).logits.float().cpu()


@contextmanager
def added(model: nn.Module, update: AdapterUpdate) -> Iterator[None]:
    """Add an update beside a bare model's layers inside the block, as an adapter does."""

    def hook(A: Tensor, B: Tensor) -> Any:
        return lambda _, inputs, output: output + ((inputs[0].float() @ A.T) @ B.T).to(output.dtype)

    with ExitStack() as stack:
        stack.enter_context(unrolled(model))
        device = next(model.parameters()).device
        for module, (A, B) in update.factors.items():
            handle = model.get_submodule(module).register_forward_hook(hook(A.to(device), B.to(device)))
            stack.callback(handle.remove)
        yield
