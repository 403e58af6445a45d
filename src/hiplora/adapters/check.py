"""Verify an export: per module in factor space, and by the logits of the model that carries it."""

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn

from hiplora.adapters.base import BaseWeights, load_base, quiet_loading
from hiplora.adapters.update import AdapterUpdate, Pair, product_norm
from hiplora.errors import AdapterError
from hiplora.models import resolve

# Logits pass through every layer: they may differ by this many times what one module's update may.
_LOGIT_FACTOR = 100.0


def compare_modules(update: AdapterUpdate, written: AdapterUpdate) -> dict[str, float]:
    """Return ‖B'A' − ΔW‖/‖ΔW‖ (Frobenius) per module; 0 where both are zero, infinite where only ΔW is.

    ΔW is taken from the adapter's own channels where it has them, in float64 and without forming it.

    Raises:
        AdapterError: a module is missing on one side.
    """
    if missing := set(update.factors) ^ set(written.factors):
        raise AdapterError(f"layer {min(missing)}: was read or written, but not both; nothing was exported")
    differences = {}
    for module in update.factors:
        P, Q = update.exact_factors(module)
        A, B = written.factors[module]
        norm = product_norm(P, Q)
        error = product_norm(torch.cat([B.double(), -P], dim=1), torch.cat([A.double(), Q]))
        differences[module] = error / norm if norm else (float("inf") if error else 0.0)
    return differences


def refuse_over(differences: Mapping[str, float], tolerance: float) -> None:
    """Raise AdapterError, naming the module that differs most, if it differs by more than the tolerance."""
    module, worst = max(differences.items(), key=lambda item: item[1])
    if not worst <= tolerance:
        raise AdapterError(
            f"layer {module}: the exported update differs by {worst:.1e} of its norm, more than the tolerance "
            f"{tolerance:.0e}; nothing was written: raise tolerance=… if that is acceptable"
        )


def compare_logits(
    update: AdapterUpdate,
    folder: Path,
    tolerance: float | None,
    model: nn.Module | None = None,
    adapter: str = "default",
) -> tuple[float | None, str]:
    """Compare the logits of an adapter and of its export, loaded by stock PEFT, on fixed tokens.

    The adapter is that of the live `model`, which is left as it is, or else loaded from disk with its base.

    Returns the largest difference in units of the largest logit, or None and the reason why it was not compared.

    Raises:
        AdapterError: the models are fp32 and differ by more than a hundred times the tolerance, unless that is None.
    """
    carrier, why = _loaded(update) if model is None else _shared_copy(model, adapter)
    if carrier is None:
        return None, f"logits not compared: {why}"
    flags = [(p, p.requires_grad) for p in model.parameters()] if model is not None else []
    bare: Any = carrier.eval()
    try:
        with added(bare, {} if isinstance(carrier, PeftModel) else update.factors):
            expected = logits_of(bare)
        if isinstance(carrier, PeftModel):
            bare = carrier.unload()
        with quiet_loading():
            stock = PeftModel.from_pretrained(bare, str(folder)).eval()
        difference = relative_difference(logits_of(stock), expected)
    finally:  # PEFT sets requires_grad on the shared base weights when it loads an adapter
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    if tolerance is not None and all(p.dtype == torch.float32 for p in stock.parameters()):
        refuse_logits(update.source, difference, _LOGIT_FACTOR * tolerance)
    return difference, ""


def refuse_logits(source: str, difference: float, limit: float) -> None:
    """Raise AdapterError if a difference of logits is over the limit."""
    if not difference <= limit:
        raise AdapterError(
            f"{source}: the exported logits differ by {difference:.1e} of the largest one, more than {limit:.0e}; "
            "nothing was written: raise tolerance=… if that is acceptable"
        )


@torch.no_grad()
def logits_of(model: nn.Module) -> Float[Tensor, "prompts length vocabulary"]:
    """Return a causal language model's logits on four rows of random tokens, the same each time, in fp32."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(20240131)
    ids = torch.randint(0, config.get_text_config().vocab_size, (4, 16), generator=generator)
    return model(input_ids=ids.to(next(model.parameters()).device)).logits.float().cpu()


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference in units of the largest expected value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


@contextmanager
def added(model: nn.Module, factors: Mapping[str, Pair]) -> Iterator[None]:
    """Add an update beside a bare model's layers inside the block, as an adapter does."""

    def hook(A: Tensor, B: Tensor) -> Any:
        return lambda _, inputs, output: output + ((inputs[0].float() @ A.T) @ B.T).to(output.dtype)

    with ExitStack() as stack:
        for module, (A, B) in factors.items():
            handle = model.get_submodule(module).register_forward_hook(hook(A, B))
            stack.callback(handle.remove)
        yield


def no_room(weights: BaseWeights, itemsize: int) -> str:
    """Return why a base model is not loaded, or nothing if it fits into memory."""
    needed = itemsize * weights.parameters
    if needed <= psutil.virtual_memory().available:
        return ""
    return f"base model {weights.model} needs {needed / 2**30:.0f} GiB, more than is free"


def _shared_copy(model: nn.Module, adapter: str) -> tuple[nn.Module | None, str]:
    """Return a copy of a PEFT model that shares its base weights, with the adapter active."""
    if not isinstance(model, PeftModel):
        return None, "the model is not a PeftModel"
    if any(getattr(module, "merged", False) for module in model.modules()):
        return None, "an adapter is merged into the model; call unmerge_adapter() first"
    own = ("hiplora_", "lora_", "modules_to_save")
    shared = {
        id(p): p
        for name, p in model.named_parameters()
        if not any(part.startswith(own) for part in name.split("."))
    }
    try:
        carrier = copy.deepcopy(model, shared)
    except Exception as error:  # a wrapped or dispatched model may hold anything; it still gets its export
        return None, f"the model cannot be copied ({error})"
    carrier.set_adapter(adapter)
    return carrier, ""


def _loaded(update: AdapterUpdate) -> tuple[nn.Module | None, str]:
    """Load the adapter that was read over its base model in fp32, or the base alone for an update in memory."""
    if not update.base or not os.path.isdir(resolve(update.base)):
        name = f"base model {update.base} is not a folder on this machine" if update.base else "no base model"
        return None, f"{name}; pass base=… (--base)"
    if why := no_room(BaseWeights(update.base), 4):
        return None, why
    stored = os.path.isdir(update.source)
    if not stored and update.extras:
        return None, "an update in memory that replaces whole modules cannot be compared"
    # An adapter without its factors loads only over the very values that it was made for.
    precision = "" if update.config.get("save_factors", True) else update.config.get("base_precision") or ""
    base = load_base(update.base, getattr(torch, precision or "float32"))
    with quiet_loading():
        return (PeftModel.from_pretrained(base, update.source) if stored else base), ""
