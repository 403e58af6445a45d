"""What each kind of job does: a function of a worker's context, the job, and its settings with all results filled in.

It returns the result, which depends on the job alone, and times and memory.
"""

import copy
import itertools
import json
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pydantic import TypeAdapter

from hiplora.adapters import allocation_rows, energy_shares
from hiplora.data.rows import hub_rows, is_hub_name, read_rows
from hiplora.devices import machine_dtype, torch_dtype
from hiplora.editing import Editor
from hiplora.editing.edits import BUILT_IN
from hiplora.editing.job import EditJob
from hiplora.errors import DataError, DivergedError, HipLoraError
from hiplora.evaluation import BaseReference, measure_drift
from hiplora.evaluation.evaluate import EvalSettings
from hiplora.evaluation.mounting import applied, holding, load_model, mounted
from hiplora.evaluation.suite import suite_of
from hiplora.merging import merge
from hiplora.models import load
from hiplora.probing.correlation import findings
from hiplora.probing.run import ProbeSettings, probe_model
from hiplora.spectral import FactorStore
from hiplora.study import pico  # noqa: F401 - makes `pico` a known model in every worker
from hiplora.study.builder import as_read
from hiplora.study.execute import start_child
from hiplora.study.jobs import DIVERGED, Job
from hiplora.study.store import Place, Store
from hiplora.training import TrainRecipe, train
from hiplora.training.baselines import AnyMethod
from hiplora.training.baselines.hiplora import Spectral
from hiplora.training.method import WEIGHTS_FILE
from hiplora.tuner import CalibrationStore, weight_factors
from hiplora.tuner.experts import unrolled

BATCH = 8  # texts scored or generated per batch
WINDOW = 512  # tokens of a window of a probe's texts
TEXTS = {"written", "written_before", "paraphrase_written", "prompt", "answer", "subject"}  # of edits: left out
OF_MODULES = ("module", "layer", "type", "norm", "left", "right", "both", "sigma", "gains")
Found = tuple[dict[str, Any], dict[str, Any]]  # a job's result, and its times and memory
Settings = Mapping[str, Any]


class Context:
    """A worker's tools, loaded on first use and kept: the base model, the engines, the reference for the drift."""

    def __init__(self, place: Place):
        self.place, self.store = place, Store(place.folder)
        self._model: tuple[Any, Any] | None = None
        self._engines: dict[str, Any] = {}
        self._references: dict[str, Any] = {}

    def model(self) -> tuple[Any, Any]:
        """Return the bare base model and its tokenizer; whoever changes the model restores it."""
        if self._model is None:
            self._model = load_model(self.place.model)
        return self._model

    def reset(self) -> None:
        """Drop the cached model; its state is unknown after a failure."""
        self._model = None
        self._references.clear()

    def engine(self, tasks: Mapping[str, int | None], seed: int) -> Any:
        """Return the evaluation engine of some tasks, each with its number of items (None: all)."""
        key, data = json.dumps([tasks, seed]), self.place.data
        if key not in self._engines:
            settings = EvalSettings("study", data, None, seed, allow_code=self.place.allow_code)
            self._engines[key] = settings.engine(suite_of("study", tasks, data), self.model()[1])
        return self._engines[key]

    def reference(self, texts: Mapping[str, str], tokens: int, window: int, documents: int | None = None) -> Any:
        """Return the bare base's predictions on the drift texts; ask for it before the model is changed."""
        key = json.dumps([texts, tokens, window, documents])
        if key not in self._references:
            contents = {name: self.text(source, documents) for name, source in texts.items()}
            self._references[key] = BaseReference.build(*self.model(), contents, window=window, max_tokens=tokens)
        return self._references[key]

    def text(self, source: str, documents: int | None = None) -> str | list[str]:
        """Return a drift text: all rows joined or, with `documents`, so many first rows as texts of their own.

        `source` is a .txt file, FILE:FIELD+FIELD (`text` if none is named), or a data set on the hub. DataError if the
        data set cannot be read, or a row lacks a field.
        """
        name, _, field_names = source.partition(":")
        path, fields = self.place.located(name), (field_names or "text").split("+")
        if documents is None and not field_names and path.endswith(".txt"):
            return Path(path).read_text(encoding="utf-8")
        rows = hub_rows(name) if is_hub_name(path) else read_rows(Path(path))
        texts = []
        for place, row in itertools.islice(rows, documents):
            if no_text := next((field for field in fields if not isinstance(row.get(field), str)), None):
                raise DataError(
                    f"drift text {source}, {place}: has no text {no_text!r}; its fields are {', '.join(row)}: name "
                    f"some as {name}:FIELD+FIELD"
                )
            texts.append("".join(row[field] for field in fields))
        if documents is not None:
            return texts
        return ("" if fields == ["text"] else "\n").join(texts)


def train_adapter(context: Context, job: Job, settings: Settings) -> Found:
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
    timing = {name: getattr(result, name) for name in ("tokens_per_second", "peak_memory_bytes")}
    return {
        **{name: getattr(result, name) for name in ("steps", "tokens", "trainable_parameters")},
        "adapter_bytes": (result.adapter / WEIGHTS_FILE).stat().st_size,
        **{f"held_out_{when}": result.held_out[when] if result.held_out else None for when in ("before", "after")},
        "curve": [[row["step"], row["loss"]] for row in result.metrics if "loss" in row],
        "warnings": result.warnings,
    }, {"training_seconds": result.seconds, **timing}


def placed_recipe(context: Context, recipe: Settings) -> dict[str, Any]:
    """Return a recipe with the base model at hand and this machine's paths for the study's file names."""
    placed = {**copy.deepcopy(dict(recipe)), "model": context.place.model, "method": as_read(recipe["method"])}
    files = {"data": ("path", "held_out"), "train": ("kl_text",), "method": ("calibration_text",)}
    for block, name in ((block, name) for block, names in files.items() for name in names):
        if placed.get(block, {}).get(name) is not None:
            placed[block][name] = context.place.located(placed[block][name])
    return placed


def factorize(context: Context, job: Job, settings: Settings) -> Found:
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
    start = time.perf_counter()
    config: Any = method.peft_config()
    store: Any
    if method.basis == "activation":
        store = CalibrationStore()
        measured = method.calibrate(config, model, tokenizer, store)
        factors = list(measured.factors.values())
        residual, energy = None, sum(layer["energy"] for layer in measured.layers) / len(measured.layers)
    else:
        store = FactorStore()
        factors = [of_weight for _, of_weight in weight_factors(model, config, store)]
        residual, energy = max(of_weight.residual for of_weight in factors), None
    ranks = [of_weight.rank for of_weight in factors]
    return {
        "basis": method.basis,
        "layers": len(ranks),
        "k": ranks[0] if len(set(ranks)) == 1 else ranks,
        "residual": residual,
        "bytes": sum(part.nbytes for of_weight in factors for part in (of_weight.U, of_weight.sigma, of_weight.V)),
        "energy": energy,
    }, {"factorize_seconds": time.perf_counter() - start, "reused": store.made == 0}


def speed(context: Context, job: Job, settings: Settings) -> Found:
    """Measure how fast a `recipe` trains in `steps` after a `warmup`, alone on the machine, and its peak memory."""
    context.reset()  # its model would lie in memory beside the one that is measured
    measured = timed(placed_recipe(context, settings["recipe"]), settings["warmup"], settings["steps"])
    return {name: measured.pop(name) for name in ("tokens", "parameters")}, measured


def timed(recipe: Settings, warmup: int, steps: int) -> dict[str, Any]:
    """Train a recipe for `warmup` + `steps` steps in a new process and return what the last `steps` took."""
    data = {k: v for k, v in recipe["data"].items() if k not in ("held_out", "held_out_fraction", "held_out_limit")}
    settings = {k: v for k, v in recipe.get("train", {}).items() if k not in ("epochs", "eval_every")}
    settings |= {"steps": warmup + steps, "log_every": 1, "save_every": warmup + steps}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start_child) as pool:
        return pool.submit(_time, {**recipe, "data": data, "train": settings}, warmup).result()


def _time(recipe: dict[str, Any], warmup: int) -> dict[str, Any]:
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


def evaluate(context: Context, job: Job, settings: Settings) -> Found:
    """Score the base, or the `adapter` that is needed, on tasks, item by item, and measure its drift on texts.

    Settings: `tasks`, name to number of items (None: all); `seed`, which chooses the items; `drift`, None or
    {texts: name to source, tokens, window, perhaps documents}; `files`, hashes of what is read.
    """
    network, _ = context.model()
    reference = drift_reference(context, settings)
    adapter = context.store.artifact(job.needs["adapter"]) if "adapter" in job.needs else None
    with mounted(network, adapter) as adapted:
        return {"tasks": score(context, adapted, settings), "drift": drift_of(adapted, reference)}, {}


def score(context: Context, model: Any, settings: Settings) -> dict[str, Any]:
    """Return, for each task, its metric's name and the items' scores, and both for the likelihood form."""
    if not settings["tasks"]:
        return {}
    scores = context.engine(settings["tasks"], settings["seed"]).score(model, context.model()[1], BATCH)
    return {task: asdict(of_task) for task, of_task in scores.items()}


def drift_reference(context: Context, settings: Settings) -> Any:
    """Return the base's predictions on the drift texts; None if no drift is asked for."""
    return context.reference(**settings["drift"]) if settings.get("drift") else None


def drift_of(model: Any, reference: Any, adapter_off: Any = None) -> dict[str, dict[str, float]] | None:
    """Return text → drift from the reference as JSON; None without a reference."""
    if reference is None:
        return None
    return {text: of_text.as_dict() for text, of_text in measure_drift(model, reference, adapter_off).items()}


def merge_adapters(context: Context, job: Job, settings: Settings) -> Found:
    """Merge the needed adapters, in the order of their names, by a `rule` with `options`, and `evaluate` the result."""
    network, _ = context.model()
    reference = drift_reference(context, settings)
    adapters = [context.store.artifact(job.needs[name]) for name in sorted(job.needs)]
    merged = merge(adapters, settings["rule"], base=context.place.model, options=settings["options"])
    with unrolled(network):
        weights = {f"{name}.weight": network.get_submodule(name).weight for name in merged.modules}
        with applied(network, merged) as changed:
            drift = drift_of(changed, reference, lambda: holding(changed, weights))
            return {"tasks": score(context, changed, settings), "drift": drift}, {}


def collect(context: Context, job: Job, settings: Settings) -> Found:
    """Choose among `candidates`, {value, needs: names of its jobs} each: the lowest mean of a `field` of the results.

    The first of equal candidates wins; one that diverged is not chosen.
    """
    field, tried = settings["field"], []
    for candidate in settings["candidates"]:
        results = [context.store.result(job.needs[name]) or {} for name in candidate["needs"]]
        mean = sum(math.nan if DIVERGED in result else float(result[field]) for result in results) / len(results)
        tried.append({"value": candidate["value"], "mean": mean if math.isfinite(mean) else None})
    usable = [candidate for candidate in tried if candidate["mean"] is not None]
    if not usable:
        raise HipLoraError(f"{job.name}: no candidate has a finite {field}; give lower rates")
    best = min(usable, key=lambda candidate: candidate["mean"])["value"]
    values = [candidate["value"] for candidate in tried]
    return {"value": best, "tried": tried, "at_the_edge": best in (min(values), max(values))}, {}


def inspect(context: Context, job: Job, settings: Settings) -> Found:
    """Locate an adapter's update on the base weights' spectrum, of which `rank` directions count as principal.

    The result has a row for each module, and the share of the update's energy ‖ΔW‖² in the principal subspaces.
    """
    rows = allocation_rows(context.store.artifact(job.needs["adapter"]), context.place.model, settings["rank"])
    rows = [{key: row[key] for key in OF_MODULES} for row in rows]
    inside = {"all": energy_shares(rows)["both"]}
    for kind in sorted({row["type"] for row in rows}):
        inside[kind] = energy_shares([row for row in rows if row["type"] == kind])["both"]
    return _rounded({"modules": rows, "energy_inside": inside}), {}


def edit(context: Context, job: Job, settings: Settings) -> Found:
    """Edit facts in the base by a method, measure the effect, and take them out again.

    Settings: those of `EditJob`, the `method` with its own in one block; `drift` as in `evaluate`, measured after the
    last edit; `files`, hashes of what is read.
    """
    method = placed_recipe(context, {"method": settings["method"]})["method"]
    fields = _fields_of(EditJob, settings)
    fields |= {"model": context.place.model, "method": method.pop("name"), "method_settings": method}
    if fields["edits"] != BUILT_IN:
        fields["edits"] = context.place.located(fields["edits"])
    edits = EditJob(**fields)
    reference, drift = drift_reference(context, settings), None

    def edited(number: int, editor: Editor) -> None:
        nonlocal drift
        if number == len(edits.groups):
            drift = drift_of(editor.model, reference, editor.off)

    record = edits.run(*context.model(), on_edited=edited)
    seconds = record.pop("seconds")
    record = json.loads(json.dumps(record), object_hook=lambda part: {k: v for k, v in part.items() if k not in TEXTS})
    return _rounded({**record, "drift": drift}), {"edit_seconds": seconds}


def probe(context: Context, job: Job, settings: Settings) -> Found:
    """Probe the base direction by direction, as `ProbeSettings` says, on `texts`, name to source."""
    probed = ProbeSettings(**{**_fields_of(ProbeSettings, settings), "model": context.place.model})
    reference = context.reference(settings["texts"], probed.tokens, WINDOW)
    rows = probe_model(context.model()[0], reference, probed)
    modules = list(dict.fromkeys(row["module"] for row in rows))
    return {"modules": modules, "records": _rounded(rows), "correlations": findings(rows, probed.seed)}, {}


def _fields_of(block: type, settings: Settings) -> dict[str, Any]:
    """Return those of a job's settings that are fields of a dataclass."""
    return {field.name: settings[field.name] for field in fields(block) if field.name in settings}


def _rounded(value: Any) -> Any:
    """Return JSON values with every float rounded to six significant digits."""
    return json.loads(json.dumps(value), parse_float=lambda text: float(f"{float(text):.6g}"))


STEPS: dict[str, Callable[[Context, Job, Settings], Found]] = {
    "train": train_adapter,
    "evaluate": evaluate,
    "merge": merge_adapters,
    "collect": collect,
    "factorize": factorize,
    "inspect": inspect,
    "edit": edit,
    "probe": probe,
    "speed": speed,
}
