"""Measure how fast a recipe trains and how much memory it takes, in a process of its own and alone on the machine.

Settings: `recipe` as of `train`; `warmup`, steps before the measured ones; `steps`, how many are measured; `files`,
hashes of what is read.
"""

import itertools
import json
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hiplora.files import write_atomic
from hiplora.study.engine.jobs import Job
from hiplora.study.isolated import run_isolated
from hiplora.study.steps.train import recipe_at
from hiplora.training import train
from hiplora.training.recipe import TrainRecipe

if TYPE_CHECKING:
    from hiplora.study.engine.bench import Bench

HELD_OUT = ("held_out", "held_out_fraction", "held_out_limit")


def work(bench: "Bench", job: Job, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train for `warmup` + `steps` steps in a temporary folder and measure the last `steps` of them.

    The result has `tokens`, the mean number in a step, and `parameters`, those that are trained. What was timed
    names the `gpu`, None without one.
    """
    bench.reset()  # its model would lie in memory beside the one that is measured
    recipe = timed_recipe(recipe_at(bench, settings["recipe"]), settings["warmup"] + settings["steps"])
    with tempfile.TemporaryDirectory(prefix="hiplora-") as temporary:
        report = Path(temporary) / "report.json"
        run_isolated(
            f"{__name__}:measure",
            {"recipe": recipe, "warmup": settings["warmup"], "report": str(report)},
        )
        measured = json.loads(report.read_text(encoding="utf-8"))
    found = {name: measured.pop(name) for name in ("tokens", "parameters")}
    return found, measured


def timed_recipe(recipe: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Return a recipe of so many steps, each with its row of metrics, without pauses to save or to measure."""
    data = {name: value for name, value in recipe["data"].items() if name not in HELD_OUT}
    trained = {
        name: value for name, value in recipe.get("train", {}).items() if name not in ("epochs", "eval_every")
    }
    return {**recipe, "data": data, "train": {**trained, "steps": steps, "log_every": 1, "save_every": steps}}


def measure(recipe: dict[str, Any], warmup: int, report: str) -> None:
    """Train and write what was measured to the file `report` (run in a process of its own)."""
    import torch

    with tempfile.TemporaryDirectory(prefix="hiplora-") as temporary:
        result = train(TrainRecipe.model_validate(recipe), Path(temporary) / "run")
    rows = [{"step": 0, "tokens": 0, "seconds": 0.0}, *result.metrics]
    steady = rows[warmup:]
    seconds = [after["seconds"] - before["seconds"] for before, after in itertools.pairwise(steady)]
    tokens = steady[-1]["tokens"] - steady[0]["tokens"]
    found = {
        "tokens": tokens / len(seconds),
        "parameters": result.trainable_parameters,
        "tokens_per_second": tokens / sum(seconds),
        "step_seconds_median": statistics.median(seconds),
        "peak_memory_bytes": result.peak_memory_bytes,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    write_atomic(Path(report), json.dumps(found))
