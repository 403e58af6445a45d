"""Jobs that measure: scores, merges, choices, where updates lie, edits, probes."""

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from hiplora.adapters import allocation_rows, energy_shares
from hiplora.editing import Editor
from hiplora.editing.edits import BUILT_IN
from hiplora.editing.job import EditJob
from hiplora.errors import HipLoraError
from hiplora.evaluation import measure_drift
from hiplora.evaluation.mounting import applied, holding, mounted
from hiplora.merging import merge
from hiplora.probing.correlation import findings
from hiplora.probing.run import ProbeSettings, probe_model
from hiplora.study.context import Context, located
from hiplora.study.jobs import DIVERGED, Job
from hiplora.study.steps import Found, rounded
from hiplora.study.steps.train import placed_recipe

BATCH = 8  # texts scored or generated per batch
WINDOW = 512  # tokens of a window of a probe's texts
OF_MODULES = ("module", "layer", "type", "norm", "left", "right", "both", "sigma", "gains")


def evaluate(context: Context, job: Job, settings: Mapping[str, Any]) -> Found:
    """Score the base, or the `adapter` that is needed, on tasks, item by item, and measure its drift on texts.

    Settings: `tasks`, name to number of items (None: all); `seed`, which chooses the items; `drift`, None or
    {texts: name to source, tokens, window, perhaps documents}; `files`, hashes of what is read.
    """
    network, _ = context.model()
    reference = drift_reference(context, settings)
    if "adapter" not in job.needs:
        return {"tasks": score(context, network, settings), "drift": None}, {}
    with mounted(network, context.store.artifact(job.needs["adapter"])) as adapted:
        return {"tasks": score(context, adapted, settings), "drift": drift_of(adapted, reference)}, {}


def score(context: Context, model: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return, for each task, its metric's name and the items' scores, and both for the likelihood form."""
    if not settings["tasks"]:
        return {}
    scores = context.engine(settings["tasks"], settings["seed"]).score(model, context.model()[1], BATCH)
    return {task: asdict(found) for task, found in scores.items()}


def drift_reference(context: Context, settings: Mapping[str, Any]) -> Any:
    """Return the base's predictions on the drift texts; None if no drift is asked for."""
    return context.reference(**settings["drift"]) if settings.get("drift") else None


def drift_of(model: Any, reference: Any, adapter_off: Any = None) -> dict[str, dict[str, float]] | None:
    """Return text → drift from the reference as JSON; None without a reference."""
    if reference is None:
        return None
    return {name: one.as_dict() for name, one in measure_drift(model, reference, adapter_off).items()}


def merge_adapters(context: Context, job: Job, settings: Mapping[str, Any]) -> Found:
    """Merge the needed adapters, in the order of their names, by a `rule` with `options`, and `evaluate` the result."""
    network, _ = context.model()
    reference = drift_reference(context, settings)
    adapters = [context.store.artifact(job.needs[name]) for name in sorted(job.needs)]
    merged = merge(adapters, settings["rule"], base=context.place.model, options=settings["options"])
    weights = {f"{name}.weight": network.get_submodule(name).weight for name in merged.modules}
    with applied(network, merged) as changed:
        drift = drift_of(changed, reference, lambda: holding(changed, weights))
        return {"tasks": score(context, changed, settings), "drift": drift}, {}


def collect(context: Context, job: Job, settings: Mapping[str, Any]) -> Found:
    """Choose among `candidates`, {value, needs: names of its jobs} each: the lowest mean of a `field` of the results.

    The first of equal candidates wins; one that diverged is not chosen.
    """
    tried = []
    for candidate in settings["candidates"]:
        found = [context.store.result(job.needs[name]) or {} for name in candidate["needs"]]
        values = [float(one[settings["field"]]) for one in found if DIVERGED not in one]
        mean = sum(values) / len(found) if len(values) == len(found) else math.nan
        tried.append({"value": candidate["value"], "mean": mean if math.isfinite(mean) else None})
    usable = [one for one in tried if one["mean"] is not None]
    if not usable:
        raise HipLoraError(f"{job.name}: no candidate has a finite {settings['field']}; give lower rates")
    best = min(usable, key=lambda one: one["mean"])
    return {"value": best["value"], "tried": tried, "at_the_edge": best in (tried[0], tried[-1])}, {}


def inspect(context: Context, job: Job, settings: Mapping[str, Any]) -> Found:
    """Locate an adapter's update on the base weights' spectrum, of which `rank` directions count as principal.

    The result has a row for each module, and the share of the update's energy ‖ΔW‖² in the principal subspaces.
    """
    rows = allocation_rows(context.store.artifact(job.needs["adapter"]), context.place.model, settings["rank"])
    rows = [{key: row[key] for key in OF_MODULES} for row in rows]
    inside = {"all": energy_shares(rows)["both"]}
    for kind in sorted({row["type"] for row in rows}):
        inside[kind] = energy_shares([row for row in rows if row["type"] == kind])["both"]
    return rounded({"modules": rows, "energy_inside": inside}), {}


def edit(context: Context, job: Job, settings: Mapping[str, Any]) -> Found:
    """Edit facts in the base by a method, measure the effect, and take them out again.

    Settings: those of `EditJob`, the `method` with its own in one block; `drift` as in `evaluate`, measured after the
    last edit; `files`, hashes of what is read.
    """
    method = placed_recipe(context, {"method": settings["method"]})["method"]
    given = _given(EditJob, settings)
    given |= {"model": context.place.model, "method": method.pop("name"), "method_settings": method}
    if given["edits"] != BUILT_IN:
        given["edits"] = located(given["edits"], context.place.data)
    asked = EditJob(**given)
    reference, drift = drift_reference(context, settings), None

    def edited(number: int, editor: Editor) -> None:
        nonlocal drift
        if number == len(asked.groups):
            drift = drift_of(editor.model, reference, editor.off)

    found = asked.run(*context.model(), texts=False, on_edited=edited)
    seconds = found.pop("seconds")
    return rounded({**found, "drift": drift}), {"edit_seconds": seconds}


def probe(context: Context, job: Job, settings: Mapping[str, Any]) -> Found:
    """Probe the base direction by direction, as `ProbeSettings` says, on `texts`, name to source."""
    asked = ProbeSettings(**{**_given(ProbeSettings, settings), "model": context.place.model})
    reference = context.reference(settings["texts"], asked.tokens, WINDOW)
    rows = probe_model(context.model()[0], reference, asked)
    modules = list(dict.fromkeys(row["module"] for row in rows))
    return {"modules": modules, "records": rounded(rows), "correlations": findings(rows, asked.seed)}, {}


def _given(block: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a job's settings that are fields of a dataclass."""
    return {field.name: settings[field.name] for field in fields(block) if field.name in settings}
