"""Jobs that train: an adapter, the factors that trainings share, and how fast a recipe trains."""

import copy
import multiprocessing
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pydantic import TypeAdapter

from hiplora.errors import DivergedError
from hiplora.models import load, machine_dtype, torch_dtype
from hiplora.spectral import FactorStore
from hiplora.study.builder import as_read
from hiplora.study.context import Context, located
from hiplora.study.execute import start_child
from hiplora.study.jobs import DIVERGED, Job
from hiplora.study.steps import Found
from hiplora.training import TrainRecipe, train
from hiplora.training.baselines import AnyMethod
from hiplora.training.baselines.hiplora import Spectral
from hiplora.training.method import WEIGHTS_FILE
from hiplora.tuner import CalibrationStore, weight_factors


def train_adapter(context: Context, job: Job, settings: Mapping[str, Any]) -> Found:
    """Train a `recipe` with the study's file names, from a needed `start` if any; the artifact is the adapter.

    An interrupted call is continued from its last checkpoint. A training that diverges is a result: the reason.
    """
    recipe = placed_recipe(context, settings["recipe"])
    if "start" in job.needs:
        start = str(context.store.artifact(job.needs["start"]))
        recipe["train"] = {"widen": False, **recipe.get("train", {}), "start_from": start}
    try:
        result = train(TrainRecipe.model_validate(recipe), context.store.artifact(job), resume=True)
    except DivergedError as error:
        return {DIVERGED: f"{job.name}: {error}"}, {}
    timing = {
        "training_seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "peak_memory_bytes": result.peak_memory_bytes,
    }
    return {
        **{name: getattr(result, name) for name in ("steps", "tokens", "trainable_parameters")},
        "adapter_bytes": (result.adapter / WEIGHTS_FILE).stat().st_size,
        **{f"held_out_{when}": result.held_out[when] if result.held_out else None for when in ("before", "after")},
        "curve": [[row["step"], row["loss"]] for row in result.metrics if "loss" in row],
        "warnings": result.warnings,
    }, timing


def placed_recipe(context: Context, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe with the base model at hand and this machine's paths for the study's file names."""
    placed = {**copy.deepcopy(dict(recipe)), "model": context.place.model, "method": as_read(recipe["method"])}
    files = {"data": ("path", "held_out"), "train": ("kl_text",), "method": ("calibration_text",)}
    for block, name in ((block, name) for block, names in files.items() for name in names):
        if placed.get(block, {}).get(name) is not None:
            placed[block][name] = located(placed[block][name], context.place.data)
    return placed


def factorize(context: Context, job: Job, settings: Mapping[str, Any]) -> Found:
    """Compute a `method`'s protected factors on the base, so that the trainings that share them find them in the cache.

    They are those of the weights in the precision of a training with `dtype: auto` on this machine, which on a GPU need
    not be the one the base is scored in. The result has the number of `layers`; `k`, the common one or a list; `bytes`
    of all factors; the largest `residual` (weight basis); `energy`, the mean share of the inputs' energy in the basis
    (activation basis).
    """
    placed = placed_recipe(context, {"method": settings["method"]})["method"]
    method: Spectral = TypeAdapter(AnyMethod).validate_python(placed)
    model, tokenizer = context.model()
    if model.dtype != (dtype := torch_dtype(machine_dtype())):
        model, tokenizer = load(context.place.model, dtype)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    began = time.perf_counter()
    config: Any = method.peft_config()
    store: Any
    if method.basis == "activation":
        store = CalibrationStore()
        measured = method.calibrate(config, model, tokenizer, store)
        factors = list(measured.factors.values())
        residual, energy = None, sum(layer.energy for layer in measured.layers) / len(measured.layers)
    else:
        store = FactorStore()
        factors = [found for _, found in weight_factors(model, config, store)]
        residual, energy = max(one.residual for one in factors), None
    ranks = [one.rank for one in factors]
    return {
        "basis": method.basis,
        "layers": len(ranks),
        "k": ranks[0] if len(set(ranks)) == 1 else ranks,
        "residual": residual,
        "bytes": sum(part.nbytes for one in factors for part in (one.U, one.sigma, one.V)),
        "energy": energy,
    }, {"factorize_seconds": time.perf_counter() - began, "reused": store.made == 0}


def speed(context: Context, job: Job, settings: Mapping[str, Any]) -> Found:
    """Measure how fast a `recipe` trains in `steps` after a `warmup`, alone on the machine, and its peak memory."""
    context.reset()  # its model would lie in memory beside the one that is measured
    measured = timed(placed_recipe(context, settings["recipe"]), settings["warmup"], settings["steps"])
    return {name: measured.pop(name) for name in ("tokens", "parameters")}, measured


def timed(recipe: Mapping[str, Any], warmup: int, steps: int) -> dict[str, Any]:
    """Train a recipe for `warmup` + `steps` steps in a new process and return what the last `steps` took."""
    data = {k: v for k, v in recipe["data"].items() if k not in ("held_out", "held_out_fraction", "held_out_limit")}
    settings = {k: v for k, v in recipe.get("train", {}).items() if k not in ("epochs", "eval_every")}
    settings |= {"steps": warmup + steps, "log_every": 1, "save_every": warmup + steps}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start_child) as pool:
        return pool.submit(_measure, {**recipe, "data": data, "train": settings}, warmup).result()


def _measure(recipe: dict[str, Any], warmup: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="hiplora-") as temporary:
        result = train(TrainRecipe.model_validate(recipe), Path(temporary) / "run")
    ends = pd.DataFrame([{"tokens": 0, "seconds": 0.0}, *result.metrics])[["tokens", "seconds"]]
    each = ends.diff()[warmup + 1 :]  # by step
    return {
        "tokens": float(each.tokens.mean()),
        "parameters": result.trainable_parameters,
        "tokens_per_second": float(each.tokens.sum() / each.seconds.sum()),
        "step_seconds_median": float(each.seconds.median()),
        "peak_memory_bytes": result.peak_memory_bytes,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
