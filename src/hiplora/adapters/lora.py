"""Lossless export to a plain LoRA adapter: `A' = [Ã; Vᵀ]`, `B' = [(α/r)B̃ | U diag(δ)]`, rank r + k, scaling 1."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from hiplora.adapters.adapter import AdapterUpdate
from hiplora.adapters.card import write_card
from hiplora.adapters.check import compare_logits, compare_modules, refuse_over
from hiplora.adapters.folder import PREFIX, WEIGHTS, check_finite, check_out
from hiplora.adapters.preflight import base_facts
from hiplora.adapters.update import read_update, update_from_model
from hiplora.errors import AdapterError, ConfigError
from hiplora.files import staged_dir

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# What selects the adapted modules; copied, since a stock config selects by the same rules.
SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# What else of an adapter's configuration a stock one has too.
CARRIED = ("modules_to_save", "task_type", "revision", "auto_mapping")


@dataclass(frozen=True)
class ExportReport:
    """What was written and how far it is from the adapter.

    `modules` is ‖B'A' − ΔW‖/‖ΔW‖ per module (Frobenius) of the tensors as written; `logits` is the largest
    difference of a logit in units of the largest logit, None if no base model was at hand (`note` says why).
    """

    path: str
    base: str
    dtype: str
    ranks: Mapping[str, int]
    modules: Mapping[str, float]
    logits: float | None
    tolerance: float
    note: str = ""
    to: str = "lora"

    @property
    def worst(self) -> tuple[str, float]:
        """The module that differs most, and by how much."""
        return max(self.modules.items(), key=lambda item: item[1])

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready record."""
        module, difference = self.worst
        return {
            "schema": 1,
            "kind": "export",
            "to": self.to,
            "path": self.path,
            "base": self.base,
            "dtype": self.dtype,
            "rank": max(self.ranks.values()),
            "tolerance": self.tolerance,
            "largest_difference": {"module": module, "relative": difference},
            "logit_difference": self.logits,
            "note": self.note,
            "modules": [
                {"module": name, "rank": self.ranks[name], "difference": d}
                for name, d in self.modules.items()
            ],
        }


def save_as_lora(
    model_or_dir: nn.Module | str | os.PathLike | AdapterUpdate,
    path: str | os.PathLike,
    *,
    adapter: str = "default",
    pad_rank: int | None = None,
    tolerance: float = 1e-5,
    base: str | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
    check_logits: bool = True,
    details: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Write an adapter as a plain LoRA folder that stock PEFT loads, and verify what was written.

    The folder holds `lora_A` and `lora_B` tensors (and those of `modules_to_save`), a stock `LoraConfig`, a model
    card and the report. It is read back and compared before it appears under `path`.

    Args:
        model_or_dir: a PEFT model, an adapter folder or an update; HiP-LoRA, Proj-LoRA, LoRA or AdaLoRA.
        path: output folder.
        adapter: name of the adapter in a model.
        pad_rank: write every module at this rank, filled up with zeros, for servers that want one fixed rank.
        tolerance: largest accepted relative difference of a module's update, before rounding to `dtype`.
        base: base model, path or name, where the one in the configuration is not to be used.
        dtype: "float32", "bfloat16" or "float16"; the last two round, and the report says how much.
        overwrite: replace `path` if it exists.
        check_logits: also compare logits, where the base model is at hand and fits into memory.
        details: what else `export.json` should say, for JSON.

    Raises:
        AdapterError: the adapter cannot be read, left its complement, needs a higher rank than `pad_rank`, or the
            result differs by more than the tolerance; nothing is written then.
        ConfigError: `path` exists, or `dtype` is unknown.
    """
    check_out(path, overwrite, _source(model_or_dir))
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    update = _read(model_or_dir, adapter, base)
    check_out(path, overwrite, update.base, "its base model")
    update.check_leak()
    with staged_dir(path, overwrite) as staged:
        write_lora(update, staged, pad_rank, DTYPES[dtype], _transposed(model_or_dir, update))
        report = _verify(model_or_dir, update, staged, adapter, DTYPES[dtype], tolerance, check_logits)
        report = replace(report, path=str(path), dtype=dtype)
        write_card(update, report.to_json(), staged, details)
    return report


def write_lora(
    update: AdapterUpdate,
    folder: Path,
    pad_rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    transposed: bool = False,
) -> None:
    """Write an update's tensors and stock configuration into an existing folder; nothing is verified.

    `transposed` says that the base layers store their weights as (in, out), as GPT-2's `Conv1D` does.

    Raises:
        AdapterError: a rank exceeds `pad_rank`, or a value overflows `dtype`.
    """
    tensors = {}
    for module, (A, B) in update.factors.items():
        for name, tensor in zip(("lora_A", "lora_B"), _padded(A, B, pad_rank, module), strict=True):
            rounded = tensor.to(dtype).contiguous()
            check_finite(rounded, f"layer {module}: {name} in {str(dtype).removeprefix('torch.')}")
            tensors[f"{PREFIX}{module}.{name}.weight"] = rounded
    tensors |= {PREFIX + name: tensor.contiguous() for name, tensor in update.extras.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    lora_config(update, pad_rank, transposed).save_pretrained(str(folder))


def lora_config(update: AdapterUpdate, pad_rank: int | None = None, transposed: bool = False) -> LoraConfig:
    """Return the stock `peft.LoraConfig` of an update: scaling 1 everywhere, patterns where ranks differ."""
    usual, unusual = pattern({module: pad_rank or rank for module, rank in update.ranks.items()})
    return LoraConfig(
        r=usual,
        lora_alpha=usual,
        rank_pattern=unusual,
        alpha_pattern=dict(unusual),
        fan_in_fan_out=transposed,
        **shared_fields(update),
    )


def pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the most usual value of some modules, and PEFT's pattern for the modules that have another one."""
    usual = Counter(values.values()).most_common(1)[0][0]
    # PEFT takes the first pattern that matches a name's end, so longer names come first.
    longest_first = sorted(values.items(), key=lambda item: -len(item[0]))
    return usual, {module: value for module, value in longest_first if value != usual}


def shared_fields(update: AdapterUpdate) -> dict[str, Any]:
    """Return the fields that the configuration of an update has in any format: its base and its modules."""
    selection = {key: update.config.get(key) for key in SELECTION}
    if not selection["target_modules"]:
        selection = {"target_modules": sorted(update.factors)}
    carried = {key: update.config.get(key) for key in CARRIED}
    return {
        "inference_mode": True,
        "base_model_name_or_path": update.base or None,
        **selection,
        **carried,
    }


def _source(model_or_dir: Any) -> str:
    if isinstance(model_or_dir, nn.Module):
        return ""
    return model_or_dir.source if isinstance(model_or_dir, AdapterUpdate) else str(model_or_dir)


def _read(model_or_dir: Any, adapter: str, base: str | None) -> AdapterUpdate:
    live = isinstance(model_or_dir, nn.Module)
    update = update_from_model(model_or_dir, adapter) if live else read_update(model_or_dir, base)
    return replace(update, base=base or update.base)


def _transposed(model_or_dir: Any, update: AdapterUpdate) -> bool:
    facts = base_facts(update, model_or_dir if isinstance(model_or_dir, nn.Module) else None)
    return facts.transposed if facts is not None else bool(update.config.get("fan_in_fan_out"))


def _padded(A: Tensor, B: Tensor, rank: int | None, module: str) -> tuple[Tensor, Tensor]:
    missing = 0 if rank is None else rank - A.shape[0]
    if missing < 0:
        raise AdapterError(
            f"layer {module}: has rank {A.shape[0]}, which does not fit into --pad-rank {rank}; "
            f"pass at least {A.shape[0]}"
        )
    return torch.cat([A, A.new_zeros(missing, A.shape[1])]), torch.cat(
        [B, B.new_zeros(B.shape[0], missing)], dim=1
    )


def _verify(
    model_or_dir: Any,
    update: AdapterUpdate,
    folder: Path,
    adapter: str,
    dtype: torch.dtype,
    tolerance: float,
    check_logits: bool,
) -> ExportReport:
    written = read_update(folder)
    modules = compare_modules(update, written)
    exact = dtype == torch.float32
    if exact:
        refuse_over(modules, tolerance)
    note, logits = "", None
    if check_logits:
        model = model_or_dir if isinstance(model_or_dir, nn.Module) else None
        logits, note = compare_logits(update, folder, model, adapter, tolerance if exact else None)
    else:
        note = "logits not compared: switched off"
    return ExportReport(str(folder), update.base, "", written.ranks, modules, logits, tolerance, note)
