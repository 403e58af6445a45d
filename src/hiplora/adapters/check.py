"""Is what was written the adapter that was read? Compared per module in factor space, and by logits."""

import copy
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor, nn

import hiplora.tuner  # noqa: F401 - registers HiP-LoRA with PEFT
from hiplora.adapters.adapter import AdapterUpdate, Pair, Update
from hiplora.adapters.base_weights import BaseWeights, load_base
from hiplora.errors import AdapterError
from hiplora.models import resolve

_PROMPTS, _LENGTH = 4, 16
# Logits pass through every layer: they may differ by this many times what one module's update may.
_LOGIT_FACTOR = 100.0
# A merged weight is a sum in fp32 of what is known in float64.
_SUM_LIMIT = 1e-5


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
        P, Q = _exact_factors(update, module)
        A, B = written.factors[module]
        norm = product_norm(P, Q)
        error = product_norm(torch.cat([B.double(), -P], dim=1), torch.cat([A.double(), Q]))
        differences[module] = error / norm if norm else (float("inf") if error else 0.0)
    return differences


def product_norm(P: Float[Tensor, "m q"], Q: Float[Tensor, "q n"]) -> float:
    """Return ‖PQ‖_F from triangular factors in float64, accurate even where columns of `P` nearly cancel."""
    R_P = torch.linalg.qr(P.double(), mode="r").R
    R_Q = torch.linalg.qr(Q.double().T, mode="r").R
    return torch.linalg.vector_norm(R_P @ R_Q.T).item()


def refuse_over(differences: Mapping[str, float], tolerance: float) -> None:
    """Refuse an export that is not the adapter.

    Raises:
        AdapterError: names the module that differs most, by how much, and the remedy.
    """
    module, worst = max(differences.items(), key=lambda item: item[1])
    if not worst <= tolerance:
        raise AdapterError(
            f"layer {module}: the exported update differs by {worst:.1e} of its norm, more than the tolerance "
            f"{tolerance:.0e}; nothing was written: raise tolerance=… if that is acceptable"
        )


class MergeCheck:
    """Compares a merged weight with its base weight plus the update, block of rows by block, in float64.

    Matrices are compared by their products with two fixed vectors of random signs, in units of ‖W‖ and ‖ΔW‖ together.
    What the update gives for these is taken from the adapter's own factors, where it has them, without forming ΔW.
    """

    def __init__(self, update: Update, module: str, transposed: bool = False):
        """Prepare for a weight that is stored as (out, in), or `transposed` as (in, out)."""
        self.module, self.transposed = module, transposed
        rows, columns = update.shape(module)
        generator = torch.Generator().manual_seed(20240131)
        signs = torch.randint(0, 2, (rows if transposed else columns, 2), generator=generator)
        self._signs = 2.0 * signs.double() - 1.0
        self._known: Tensor | None = None
        if isinstance(update, AdapterUpdate):
            P, Q = _exact_factors(update, module)
            self._known = Q.T @ (P.T @ self._signs) if transposed else P @ (Q @ self._signs)
        self._row, self._scale, self._off, self._rounded_off = 0, 0.0, 0.0, 0.0

    def add(self, weight: Tensor, change: Tensor, merged: Tensor, written: Tensor) -> None:
        """Compare the next rows: of the base weight, of the update, of their sum, and of that in its number format."""
        rows = slice(self._row, self._row + len(weight))
        self._row = rows.stop
        before = weight.double() @ self._signs
        added = change.double() @ self._signs if self._known is None else self._known[rows]
        self._scale += _square(before) + _square(added)
        self._off += _square(merged.double() @ self._signs - before - added)
        self._rounded_off += _square(written.double() @ self._signs - before - added)

    @property
    def difference(self) -> float:
        """How far what was written is from the base weight plus the update; rounding counts."""
        return self._relative(self._rounded_off)

    def refuse(self) -> None:
        """Refuse a sum that is wrong by more than rounding in fp32.

        Raises:
            AdapterError: names the module and by how much.
        """
        if not self._relative(self._off) <= _SUM_LIMIT:
            raise AdapterError(
                f"layer {self.module}: the merged weight differs by {self._relative(self._off):.1e} from the base "
                f"weight plus the update, more than {_SUM_LIMIT:.0e}; nothing was written"
            )

    def _relative(self, square: float) -> float:
        return (square / self._scale) ** 0.5 if self._scale else (float("inf") if square else 0.0)


def compare_logits(
    update: AdapterUpdate, folder: Path, model: nn.Module | None, adapter: str, tolerance: float | None
) -> tuple[float | None, str]:
    """Compare the logits of the adapter and of its export, loaded by stock PEFT, on a fixed set of prompts.

    Args:
        update: the adapter that was read; its base and source are loaded where no `model` is given.
        folder: the written export.
        model: the live model that carries the adapter; it is left as it is.
        adapter: its name there.
        tolerance: refuse a larger difference than a hundred times this; None only reports it. Models in half
            precision are only reported as well.

    Returns:
        the largest difference in units of the largest logit, or None and the reason why it was not compared.

    Raises:
        AdapterError: over the tolerance.
    """
    if model is not None:
        carrier, why = _structural_copy(model)
    else:
        carrier, why = _loaded(update)
    if carrier is None:
        return None, f"logits not compared: {why}"
    with _frozen_flags(model):
        difference, exact = _difference(carrier, adapter if model is not None else "default", update, folder)
    if tolerance is not None and exact and not difference <= _LOGIT_FACTOR * tolerance:
        raise AdapterError(
            f"{update.source}: the exported adapter's logits differ by {difference:.1e} of the largest one, more than "
            f"{_LOGIT_FACTOR * tolerance:.0e}; nothing was written: raise tolerance=… if that is acceptable"
        )
    return difference, ""


def fixed_prompts(vocabulary: int) -> Int[Tensor, "prompts length"]:
    """Return the token ids that logits are compared on: the same ones for a vocabulary, always."""
    generator = torch.Generator().manual_seed(20240131)
    return torch.randint(0, vocabulary, (_PROMPTS, _LENGTH), generator=generator)


@torch.no_grad()
def logits_of(model: nn.Module) -> Float[Tensor, "prompts length vocabulary"]:
    """Return a causal language model's logits on the fixed prompts, fp32, on the CPU."""
    config: Any = model.config
    ids = fixed_prompts(config.get_text_config().vocab_size).to(next(model.parameters()).device)
    return model(input_ids=ids).logits.float().cpu()


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence the libraries' advice to each other while an adapter is loaded, and PEFT's look for its base's name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Unable to fetch remote file|Could not find a config file")
        yield


@contextmanager
def added(model: nn.Module, factors: Mapping[str, Pair]) -> Iterator[None]:
    """Add an update beside a bare model's layers, as an adapter does; the model is left as it was."""

    def hook(A: Tensor, B: Tensor) -> Any:
        return lambda _, inputs, output: output + ((inputs[0].float() @ A.T) @ B.T).to(output.dtype)

    with ExitStack() as stack:
        for module, (A, B) in factors.items():
            handle = model.get_submodule(module).register_forward_hook(hook(A, B))
            stack.callback(handle.remove)
        yield


def no_room(base: str, needed: int) -> str:
    """Return why a base model that needs so many bytes is not loaded, or nothing if it fits into memory."""
    if needed <= psutil.virtual_memory().available:
        return ""
    return f"base model {base} needs {needed / 2**30:.0f} GiB, more than is free"


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference in units of the largest expected value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def _square(tensor: Tensor) -> float:
    return tensor.square().sum().item()


def _exact_factors(update: AdapterUpdate, module: str) -> tuple[Tensor, Tensor]:
    """Return ΔW = PQ in float64, from the channels (Eq. 1, 2, 5) where the adapter has them."""
    channels = update.channels.get(module)
    if channels is None:
        A, B = update.factors[module]
        return B.double(), A.double()
    A, B, U, V = (getattr(channels, name).double() for name in ("A", "B", "U", "V"))
    if channels.delta is None:
        return channels.scaling * B, A
    return torch.cat([channels.scaling * B, U * channels.delta.double()], dim=1), torch.cat([A, V.T])


def _difference(carrier: nn.Module, adapter: str, update: AdapterUpdate, folder: Path) -> tuple[float, bool]:
    """Return the logit difference, and whether the model is precise enough to judge by it; takes it apart."""
    model: Any = carrier.eval()
    if isinstance(model, PeftModel):
        model.set_adapter(adapter)
        expected = logits_of(model)
        model = model.unload()
    else:
        with added(model, update.factors):
            expected = logits_of(model)
    with quiet_loading():
        stock = PeftModel.from_pretrained(model, str(folder)).eval()
    exact = all(p.dtype == torch.float32 for p in stock.parameters())
    return relative_difference(logits_of(stock), expected), exact


def _structural_copy(model: nn.Module) -> tuple[nn.Module | None, str]:
    """Return a copy of a PEFT model that shares the base weights, so that it can be taken apart."""
    if not isinstance(model, PeftModel):
        return None, "the model is not a PeftModel"
    if any(getattr(module, "merged", False) for module in model.modules()):
        return None, "an adapter is merged into the model; call unmerge_adapter() first"
    base = {id(p): p for name, p in model.named_parameters() if not _belongs_to_adapter(name)}
    try:
        return copy.deepcopy(model, base), ""
    except Exception as error:  # a wrapped or dispatched model may hold anything; it still gets its export
        return None, f"the model cannot be copied ({error})"


def _belongs_to_adapter(name: str) -> bool:
    return any(part.startswith(("hiplora_", "lora_", "modules_to_save")) for part in name.split("."))


@contextmanager
def _frozen_flags(model: nn.Module | None) -> Iterator[None]:
    """Put `requires_grad` back: PEFT sets it on the shared base weights when it loads an adapter."""
    before = [(p, p.requires_grad) for p in model.parameters()] if model is not None else []
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


def _loaded(update: AdapterUpdate) -> tuple[nn.Module | None, str]:
    """Load the adapter that was read over its base model, or the base alone for an update in memory.

    In fp32, if the model is here and fits into memory; else None and the reason.
    """
    if not update.base:
        return None, "the adapter names no base model; pass base=… (--base)"
    if not os.path.isdir(resolve(update.base)):
        return None, f"base model {update.base} is not a folder on this machine; pass base=… (--base)"
    if why := no_room(update.base, 4 * BaseWeights(update.base).parameters):
        return None, why
    stored = os.path.isdir(update.source)
    if not stored and update.extras:
        return None, "an update in memory that replaces whole modules cannot be compared"
    # An adapter without its factors loads only over the very values that it was made for.
    saved = update.config.get("save_factors", True)
    dtype = torch.float32 if saved else getattr(torch, update.config.get("base_precision", ""), torch.float32)
    base = load_base(update.base, dtype)
    with quiet_loading():
        return (PeftModel.from_pretrained(base, update.source) if stored else base), ""
