"""Verify an export: per module in factor space, and by the logits of the model that carries it."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

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


def compare_logits(update: AdapterUpdate, folder: Path, tolerance: float | None) -> tuple[float | None, str]:
    """Compare the logits of an adapter over its base and of its export, loaded by stock PEFT, on fixed tokens.

    An adapter folder is loaded by PEFT, an update in memory is added beside the base model's layers.

    Returns the largest difference in units of the largest logit, or None and the reason why it was not compared.

    Raises:
        AdapterError: the models are fp32 and differ by more than a hundred times the tolerance, unless that is None.
    """
    stored = os.path.isdir(update.source)
    if why := _obstacle(update, stored):
        return None, f"logits not compared: {why}"
    # An adapter without its factors loads only over the very values that it was made for.
    precision = "" if update.config.get("save_factors", True) else update.config.get("base_precision") or ""
    bare: Any = load_base(update.base, getattr(torch, precision or "float32"))
    with quiet_loading():
        if stored:
            carrier = PeftModel.from_pretrained(bare, update.source).eval()
            expected, bare = logits_of(carrier), carrier.unload()
        else:
            with added(bare, update.factors):
                expected = logits_of(bare)
        stock = PeftModel.from_pretrained(bare, str(folder)).eval()
    exact = all(p.dtype == torch.float32 for p in stock.parameters())
    limit = _LOGIT_FACTOR * tolerance if exact and tolerance is not None else None
    return logit_difference(logits_of(stock), expected, update.source, limit), ""


def _obstacle(update: AdapterUpdate, stored: bool) -> str:
    """Return why an adapter's logits cannot be computed; empty if they can."""
    if not update.base or not os.path.isdir(resolve(update.base)):
        name = f"base model {update.base} is not a folder on this machine" if update.base else "no base model"
        return f"{name}; pass base=… (--base)"
    if update.extras and not stored:
        return "an update in memory that replaces whole modules cannot be compared"
    return BaseWeights(update.base).no_room(torch.float32.itemsize)


def logit_difference(found: Tensor, expected: Tensor, source: str, limit: float | None) -> float:
    """Return the largest difference of logits in units of the largest; AdapterError if it is over the limit."""
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if limit is not None and not difference <= limit:
        raise AdapterError(
            f"{source}: the exported logits differ by {difference:.1e} of the largest one, more than {limit:.0e}; "
            "nothing was written: raise tolerance=… if that is acceptable"
        )
    return difference


@torch.no_grad()
def logits_of(model: nn.Module) -> Float[Tensor, "prompts length vocabulary"]:
    """Return a causal language model's logits on four rows of random tokens, the same each time, in fp32."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(20240131)
    ids = torch.randint(0, config.get_text_config().vocab_size, (4, 16), generator=generator)
    return model(input_ids=ids.to(next(model.parameters()).device)).logits.float().cpu()


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
