"""Train an adapter from a recipe, as `hiplora train` does; the artifact is the adapter's folder.

Settings: `recipe`, a training recipe whose files are named as the study's are; `files`, their hashes. Needs: `start`,
the adapter to carry on from, if any.
"""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from hiplora.errors import DivergedError
from hiplora.study.engine.jobs import DIVERGED, Job
from hiplora.study.steps.methods import method_at
from hiplora.training import train
from hiplora.training.memory import peak_reserved_bytes
from hiplora.training.method import WEIGHTS_FILE
from hiplora.training.recipe import TrainRecipe
from hiplora.training.result import TrainResult

if TYPE_CHECKING:
    from hiplora.study.engine.bench import Bench


def work(bench: "Bench", job: Job, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train, or go on from the last checkpoint of an interrupted call."""
    placed = recipe_at(bench, settings["recipe"])
    if "start" in job.needs:
        placed["train"] = {
            **placed.get("train", {}),
            "start_from": str(bench.artifact(job.needs["start"]).resolve()),
        }
    recipe = TrainRecipe.model_validate(placed)
    try:
        result = train(recipe, bench.artifact(job), resume=True)
    except DivergedError as error:  # found out about this rate and seed: there is no adapter
        return {DIVERGED: f"{job.name}: {error}"}, {}
    return _found(result), {
        "training_seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "peak_memory_bytes": result.peak_memory_bytes,
        "peak_reserved_bytes": peak_reserved_bytes(),
        **_reserved(result),
    }


def recipe_at(bench: "Bench", recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe with the study's file names turned into this machine's paths, for the base model at hand."""
    placed = {**copy.deepcopy(dict(recipe)), "model": bench.name}
    if "method" in placed:
        placed["method"] = method_at(bench, placed["method"])
    for key, names in (("data", ("path", "held_out")), ("train", ("kl_text",))):
        block = placed.get(key, {})
        for name in names:
            if block.get(name) is not None:
                block[name] = bench.path(block[name])
    return placed


def _reserved(result: TrainResult) -> dict[str, float]:
    """What the CUDA allocator held after the steps: mean and 99th percentile; nothing without a GPU."""
    held = [row["reserved_bytes"] for row in result.metrics if "reserved_bytes" in row]
    if not held:
        return {}
    return {
        "reserved_bytes_mean": float(np.mean(held)),
        "reserved_bytes_99th": float(np.percentile(held, 99)),
    }


def _found(result: TrainResult) -> dict[str, Any]:
    learned = [row for row in result.metrics if "loss" in row]
    return {
        "steps": result.steps,
        "tokens": result.tokens,
        "trainable_parameters": result.trainable_parameters,
        "adapter_bytes": (result.adapter / WEIGHTS_FILE).stat().st_size,
        "held_out_before": result.held_out["before"] if result.held_out else None,
        "held_out_after": result.held_out["after"] if result.held_out else None,
        "curve": [[row["step"], row["loss"]] for row in learned],
        "warnings": result.warnings,
    }
