"""`hiplora compare`: LoRA and HiP-LoRA in two bases on one's own data with one budget, side by side."""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hiplora import __version__
from hiplora.errors import ConfigError
from hiplora.evaluation.texts import drift_texts
from hiplora.provenance import folder_identity, json_sha256, provenance
from hiplora.recipes import TrainRecipe, model_problems
from hiplora.study.data import SplitData, split_data
from hiplora.study.folder import StudyFolder, check_claim, claimed, finish
from hiplora.study.isolated import run_here, run_isolated
from hiplora.study.methods import METHODS, Ranks, mismatch, slug

DRIFT_TOKENS = 2048  # of each text


@dataclass(frozen=True)
class CompareSettings:
    """What to compare, on what, and how long. All methods get the same steps, rate, rows in the same order."""

    model: str
    data: str
    steps: int = 200
    lr: float = 2e-4
    batch_size: int = 8
    max_length: int = 512
    rank: int = 16
    principal_rank: int = 32
    drift_text: str | None = None
    heldout_fraction: float = 0.1
    seed: int = 42

    def __post_init__(self) -> None:
        """Refuse values that make no sense, naming the option."""
        for name, least in (("steps", 1), ("batch_size", 1), ("max_length", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{_option(name)} is {getattr(self, name)}; expected at least {least}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"--lr is {self.lr}; expected a number above 0")
        if not 0 < self.heldout_fraction < 1:
            raise ConfigError(
                f"--heldout-fraction is {self.heldout_fraction}; expected a share between 0 and 1"
            )
        self.ranks  # noqa: B018 - checks the ranks

    @property
    def ranks(self) -> Ranks:
        """Ranks of all methods."""
        return Ranks(self.rank, self.principal_rank, alpha=2 * self.rank)

    def recipe(self, method: str, data: Path, shape: str) -> TrainRecipe:
        """Return the training recipe of a method on the training part of the data."""
        return TrainRecipe.model_validate(
            {
                "model": self.model,
                "data": {"path": str(data), "format": shape},
                "method": self.ranks.settings(method),
                "train": {
                    "steps": self.steps,
                    "lr": self.lr,
                    "batch_size": self.batch_size,
                    "gradient_accumulation": 1,
                    "max_length": self.max_length,
                    "packing": False,
                },
                "seed": self.seed,
            }
        )


def compare(
    settings: CompareSettings, out: str | os.PathLike, *, overwrite: bool = False, isolated: bool = True
) -> dict[str, Any]:
    """Train all methods, measure them, write the study's folder and return its results.

    An unfinished study of the same settings in `out` is carried on. `isolated` trains each method in a process
    of its own, without which peak memory is not reported.

    Raises:
        ConfigError, DataError: settings, model, data or output folder cannot be used; found before a model loads.
        HipLoraError: training failed.
    """
    if problems := model_problems(settings.model):
        raise ConfigError("\n".join(problems))
    data = split_data(Path(settings.data), settings.heldout_fraction)
    texts = drift_texts(settings.drift_text)
    plan = _plan(settings, data, texts)
    check_claim(Path(out), plan, overwrite)
    from hiplora.study.preflight import check_inputs  # transformers: only once the rest is in order

    notes = check_inputs(settings.model, data, texts, settings.principal_rank, settings.max_length)
    with claimed(Path(out), plan, overwrite) as folder:
        data.write(folder.path / "data")
        call = run_isolated if isolated else run_here
        arguments = {"folder": str(folder.path), "settings": asdict(settings), "shape": data.shape}
        for method in METHODS:
            if not folder.has(f"train-{slug(method)}"):
                call("hiplora.study.compare:train_method", {**arguments, "method": method})
        if not folder.has("measure-base", *(f"measure-{slug(method)}" for method in METHODS)):
            run_here("hiplora.study.compare:measure_methods", arguments)
        results = _collect(folder, settings, data, plan, notes, isolated)
        finish(folder, results)
    return results


def train_method(folder: str, settings: Mapping[str, Any], shape: str, method: str) -> None:
    """Train one method on the study's training rows (a stage, run in a process of its own)."""
    from hiplora.training import train
    from hiplora.training.progress import TrainingBar

    study, chosen = StudyFolder(Path(folder)), CompareSettings(**settings)

    def work() -> dict[str, Any]:
        recipe = chosen.recipe(method, study.path / "data" / "train.jsonl", shape)
        with TrainingBar(method) as bar:
            result = train(recipe, study.adapter(slug(method)), resume=True, on_step=bar, on_phase=bar.phase)
        return {
            "trainable_parameters": result.trainable_parameters,
            "seconds": result.seconds,
            "tokens": result.tokens,
            "peak_memory_bytes": result.peak_memory_bytes,
            "curve": [{"step": row["step"], "loss": row["loss"]} for row in result.metrics if "loss" in row],
        }

    study.run(f"train-{slug(method)}", work, f"training {method}")


def measure_methods(folder: str, settings: Mapping[str, Any], shape: str) -> None:
    """Measure the base and each trained adapter (stages)."""
    from hiplora.evaluation.likelihood import heldout_loss
    from hiplora.models import load
    from hiplora.study.measure import allocation, base_reference, measure_adapter
    from hiplora.study.preflight import encoded_rows

    study, chosen = StudyFolder(Path(folder)), CompareSettings(**settings)
    model, tokenizer = load(chosen.model)
    heldout, _ = encoded_rows(tokenizer, study.path / "data" / "heldout.jsonl", shape, chosen.max_length)
    size = chosen.batch_size
    study.run(
        "measure-base", lambda: {"heldout_loss_before": heldout_loss(model, heldout, size)}, "held-out loss"
    )
    reference = base_reference(model, tokenizer, drift_texts(chosen.drift_text), DRIFT_TOKENS)
    for method in METHODS:
        adapter = study.adapter(slug(method))

        def work(adapter: Path = adapter) -> dict[str, Any]:
            measured = measure_adapter(model, adapter, reference, heldout, size)
            return {**measured, "allocation": allocation(adapter, chosen.model, chosen.principal_rank)}

        study.run(f"measure-{slug(method)}", work, f"measuring {method}")


def _collect(
    folder: StudyFolder,
    settings: CompareSettings,
    data: SplitData,
    plan: Mapping[str, Any],
    notes: list[str],
    isolated: bool,
) -> dict[str, Any]:
    methods = {}
    for method in METHODS:
        trained, measured = (folder.read(f"{stage}-{slug(method)}") or {} for stage in ("train", "measure"))
        methods[method] = {**trained, **(folder.read("measure-base") or {}), **measured}
        if not isolated:
            del methods[method]["peak_memory_bytes"]
    parameters = {method: record["trainable_parameters"] for method, record in methods.items()}
    return {
        "schema": 1,
        "kind": "compare",
        "title": f"LoRA and HiP-LoRA on {data.source}",
        "model": settings.model,
        "created": (origin := provenance(plan_sha256=json_sha256(dict(plan)), seconds=folder.seconds()))[
            "time"
        ],
        "data": {
            "source": data.source,
            "train_examples": len(data.train),
            "heldout_examples": len(data.heldout),
            "sha256": data.sha256,
        },
        "settings": _settings(settings),
        "provenance": origin,
        "methods": methods,
        "notes": [mismatch(parameters), _CALIBRATED, *notes, _ONE_RUN],
    }


_CALIBRATED = (
    "HiP-LoRA (activation) protects the directions that its layers are fed, measured on text sampled from the model; "
    "its training time does not count that."
)
_ONE_RUN = "One run of each method with one seed: small differences may be chance."


def _settings(settings: CompareSettings) -> dict[str, Any]:
    """The settings as shown: what both share, and each method's own."""
    shared = {
        "steps": settings.steps,
        "lr": settings.lr,
        "batch_size": settings.batch_size,
        "max_length": settings.max_length,
        "seed": settings.seed,
        "heldout_fraction": settings.heldout_fraction,
        "drift_tokens": DRIFT_TOKENS,
    }
    return {method: {**settings.ranks.settings(method), **shared} for method in METHODS}


def _plan(settings: CompareSettings, data: SplitData, texts: Mapping[str, str]) -> dict[str, Any]:
    """What makes two runs the same study."""
    chosen = {name: value for name, value in asdict(settings).items() if name not in ("data", "drift_text")}
    return {
        "kind": "compare",
        "hiplora": __version__,
        "settings": chosen,
        "data_sha256": data.sha256,
        "drift_texts_sha256": json_sha256(texts),
        "model_sha256": folder_identity(settings.model),
    }


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
