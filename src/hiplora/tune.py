"""`hiplora tune`: the learning rate, rank, steps and scale at which HiP-LoRA learns most within a limit of drift."""

import itertools
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from hiplora.compare import CompareSettings, method_recipes
from hiplora.compare_report import Results
from hiplora.data.texts import drift_texts
from hiplora.errors import ConfigError
from hiplora.files import write_atomic
from hiplora.run_folder import RunFolder
from hiplora.training import TrainRecipe
from hiplora.trainings import Tell, Trainings


@dataclass(frozen=True)
class TuneSettings:
    """What may be lost, in nats per token on the worst text, and what is tried: every rate with every rank."""

    max_drift: float = 0.01
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    ranks: tuple[int, ...] = (16,)
    steps: int = 40
    batch_size: int = 4
    max_length: int = 512
    drift_text: str | None = None
    seed: int = 42


def tune(
    model: str,
    data: str | os.PathLike,
    out: str | os.PathLike,
    settings: TuneSettings | None = None,
    *,
    overwrite: bool = False,
    tell: Tell = lambda text: None,
) -> Results:
    """Train HiP-LoRA on the rows of `data` with every setting; write `tune.json`, `recipe.yaml` and the adapters.

    `recipe.yaml` is the setting whose held-out loss is lowest while the drift stays within the limit, at a mark along
    the training or with the finished adapter scaled down; it is not written if no setting learns within the limit.
    An unfinished search in `out` goes on where it stopped. Of several processes under a launcher all but the first
    return nothing. ConfigError or DataError if settings, model, data or `out` cannot be used, before a model loads.
    """
    settings = settings or TuneSettings()
    recipes = _recipes(model, data, settings)
    texts = drift_texts(settings.drift_text)
    trainings = Trainings("tune", model, data, recipes, settings)
    folder, titles = RunFolder(Path(out), "plan.json", "tune.json"), {key: key for key in recipes}
    if not trainings.leads:
        trainings.follow(folder)
        return {}
    with trainings.measured(folder, titles, texts, overwrite=overwrite, tell=tell) as (shared, runs):
        base_loss = shared["base"]["held_out_loss"]
        best = {key: within(record, settings.max_drift, base_loss) for key, record in runs.items()}
        reached = {key: point for key, point in best.items() if point is not None}
        chosen = min(reached, key=lambda key: reached[key]["held_out_loss"], default=None)
        if chosen is not None:
            write_atomic(folder.path / "recipe.yaml", _written(recipes[chosen], reached[chosen], settings.max_drift))
        results = {
            "schema": 1,
            **shared,
            "settings": asdict(settings),
            "runs": {key: {"rank": recipes[key].method.r, "best": best[key], **runs[key]} for key in runs},
            "chosen": chosen,
        }
        write_atomic(folder.path / "tune.json", json.dumps(results, indent=1) + "\n")
    return results


def within(record: Results, limit: float, base: float) -> Results | None:
    """Return of a run's measured points the one with the lowest held-out loss, below the base's, within the limit.

    The drift of a point is that on its worst text. None if no point learns anything within the limit.
    """
    points = [*record["trained"], *record["scaled"]]
    usable = [point for point in points if worst(point) <= limit and point["held_out_loss"] < base]
    return min(usable, key=lambda point: point["held_out_loss"], default=None)


def worst(point: Results) -> float:
    """Return the drift of a point on the text that it moved most, in nats per token."""
    return float(max(drift["kl"] for drift in point["drift"].values()))


def summary(results: Results) -> pd.DataFrame:
    """Return the search as a table, a row a training: its best point within the limit, and its end."""
    rows = []
    for run in results["runs"].values():
        row: dict[str, Any] = {"learning rate": f"{run['lr']:g}", "r": run["rank"]}
        for name, point in {"within the limit": run["best"], "at the end": run["trained"][-1]}.items():
            row[f"loss {name}"] = f"{point['held_out_loss']:.3f}" if point else "–"
            row[f"drift {name}"] = f"{worst(point):.2g}" if point else "–"
        best = run["best"] or {}
        row["reached at"] = f"scale {best['scale']:g}" if "scale" in best else f"step {best.get('step', '–')}"
        rows.append(row)
    return pd.DataFrame(rows)


def _recipes(model: str, data: str | os.PathLike, settings: TuneSettings) -> dict[str, TrainRecipe]:
    """Return the recipe of every rate with every rank; ConfigError if there are none, or a setting is wrong."""
    if not settings.rates or not settings.ranks:
        raise ConfigError("--rates and --ranks: name at least one of each")
    if not 0 < settings.max_drift < math.inf:
        raise ConfigError(f"--max-drift is {settings.max_drift}; expected nats per token, above 0, for example 0.01")
    fields = CompareSettings.__dataclass_fields__.keys() & TuneSettings.__dataclass_fields__.keys()
    shared = {name: getattr(settings, name) for name in fields}
    recipes = {}
    for rate, rank in itertools.product(settings.rates, settings.ranks):
        compared = CompareSettings(("hiplora",), lr=rate, rank=rank, **shared)
        recipes[f"lr{rate:g}-r{rank}"] = method_recipes(model, data, compared)["hiplora"]
    return recipes


def _written(recipe: TrainRecipe, point: Results, limit: float) -> str:
    """Return the recipe that trains what was measured at a point, in YAML."""
    values = recipe.values()
    planned: int = recipe.train.steps  # type: ignore[assignment]  # `method_recipes` sets no epochs
    values["train"]["steps"] = steps = point.get("step", planned)
    if steps != planned:  # the warm-up is as many steps, whatever their share rounds to
        values["train"]["warmup_ratio"] = (recipe.train.warmup_steps(planned) - 0.5) / steps
    comment = (
        f"# Held-out loss {point['held_out_loss']:.3f} at a drift of {worst(point):.2g}, of {limit:g} nats per token."
    )
    if point.get("scale", 1.0) != 1.0:
        comment += f"\n# Then scaled down: hiplora export ADAPTER --scale {point['scale']:g} --to lora --out DIR"
    return f"{comment}\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}"
