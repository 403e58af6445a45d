"""`hiplora demo`: two sets of factual edits, trained apart with each method, then added together."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hiplora import __version__
from hiplora.editing.edits import EditSet, load_edit_sets
from hiplora.errors import ConfigError, DataError
from hiplora.evaluation.texts import drift_texts
from hiplora.provenance import folder_identity, json_sha256
from hiplora.recipes import model_problems
from hiplora.study.demo_results import collect
from hiplora.study.folder import check_claim, claimed, finish
from hiplora.study.isolated import run_here, run_isolated
from hiplora.study.methods import LORA, METHODS, Ranks, slug

BASE = "base"  # the stage that measures the base model, once for all methods
SETS = 2


@dataclass(frozen=True)
class DemoSettings:
    """What the demonstration edits, and how; the defaults are the built-in job.

    Steps and learning rate are where LoRA and HiP-LoRA reach at least 14 of 16 edits of each set, measured on
    SmolLM2-135M; all methods get the same. `threads` is torch's number of threads, None for its own choice.
    """

    model: str = "smollm2-135m"
    edits: str | None = None
    steps: int = 12
    lr: float = 1e-3
    batch_size: int = 16
    ranks: Ranks = field(default_factory=lambda: Ranks(dropout=0.0))
    drift_tokens: int = 1024
    seed: int = 42

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DemoSettings":
        """Rebuild settings from `dataclasses.asdict`."""
        return cls(**{**values, "ranks": Ranks(**values["ranks"])})

    def sets(self) -> list[EditSet]:
        """Read the edit sets.

        Raises:
            DataError: the file cannot be used, or has not two sets.
        """
        sets = load_edit_sets(self.edits)
        if len(sets) != SETS:
            raise DataError(
                f"edits {self.edits or 'built-in'}: {len(sets)} sets; the demonstration needs {SETS}"
            )
        return sets


def demo(
    settings: DemoSettings, out: str | os.PathLike, *, overwrite: bool = False, isolated: bool = True
) -> dict[str, Any]:
    """Run the demonstration, write the study's folder and return its results.

    An unfinished one in `out` is carried on. `isolated` gives each method a process of its own, without which
    peak memory is not reported.

    Raises:
        ConfigError, DataError: model, edits or output folder cannot be used.
        HipLoraError: training or the export's check failed.
    """
    if problems := model_problems(settings.model):
        raise ConfigError("\n".join(problems))
    sets = settings.sets()
    plan = _plan(settings, sets)
    check_claim(Path(out), plan, overwrite)
    with claimed(Path(out), plan, overwrite) as folder:
        call = run_isolated if isolated else run_here
        arguments = {"folder": str(folder.path), "settings": asdict(settings)}
        for method in METHODS:
            if not folder.has(*stages(method, sets)):
                call("hiplora.study.demo_stages:run_method", {**arguments, "method": method})
        results = collect(folder, settings, sets, plan, isolated)
        finish(folder, results)
    return results


def stages(method: str, sets: Sequence[EditSet]) -> list[str]:
    """Return the names of a method's stages, in order; the base model's is shared, LoRA needs no export."""
    names = [stage_name(method, stage, part) for stage in ("train", "measure") for part in sets]
    last = ["merge"] if method == LORA else ["merge", "export"]
    # Training first: its peak memory must not be that of what was measured before it.
    return [*names[: len(sets)], BASE, *names[len(sets) :], *(stage_name(method, stage) for stage in last)]


def stage_name(method: str, stage: str, part: EditSet | None = None) -> str:
    """Return the name of one of a method's stages."""
    return "-".join([slug(method), stage] + ([slug(part.name)] if part else []))


def _plan(settings: DemoSettings, sets: Sequence[EditSet]) -> dict[str, Any]:
    chosen = {name: value for name, value in asdict(settings).items() if name != "edits"}
    return {
        "kind": "demo",
        "hiplora": __version__,
        "settings": chosen,
        "edits_sha256": json_sha256([asdict(part) for part in sets]),
        "drift_texts_sha256": json_sha256(drift_texts()),
        "model_sha256": folder_identity(settings.model),
    }
