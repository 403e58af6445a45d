"""What a rule's merges broke, by one form of the scores: the verdicts of a check, and how a page shows them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hiplora.evaluation.judgement import Instance, judge
from hiplora.evaluation.mounting import BASE

_NO_OWNERS = (
    "No adapter was given as TASK=FOLDER: each task counts as that of the adapter that is best at it, which makes "
    "the scores before the merge look a little better than they are."
)
_ONE_MERGE = "MergeFail is of one merge, which fails or does not."


@dataclass(frozen=True)
class Group:
    """Adapters that are merged by a rule; `whole` where it is all of them."""

    method: str
    names: tuple[str, ...]
    whole: bool


def verdict(
    found: Mapping[str, Any],
    owners: Mapping[str, str],
    groups: Mapping[str, Group],
    method: str,
    form: str,
    seed: int = 0,
) -> dict[str, Any]:
    """Judge a rule's merges by one form of the scores.

    Args:
        found: `tasks`, `runs` and `differences`, as `collect` returns them.
        owners: task → the run that was trained for it; if empty, each task belongs to the adapter that is best at it.
        groups: the merges.
        method: the rule; `runs` has its merge of all under its name.
        form: `score` or `likelihood`.
        seed: of the intervals.

    Returns:
        `tasks` (an owner's score before, the merge's after, the difference with its interval), `kept` (the same for the
        tasks of no adapter, before being the base's), `merge_fail` over τ and `mean_drop` over the rule's merges, with
        intervals, `instances` (how many merges those are) and `notes`.
    """
    mine = {label: group for label, group in groups.items() if group.method == method}
    having = [task for task in found["tasks"] if form in found["runs"][method].get(task, {})]
    notes = []
    if not owners:
        owners = {task: _best(found["runs"], mine[method].names, task, form) for task in having}
        notes.append(_NO_OWNERS)
    tasks: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    for task in having:
        before = owners.get(task, BASE)
        changed = {"before_of": before, **_change(found, task, form, before, method)}
        (tasks if task in owners else kept)[task] = changed
    instances = []
    for label, group in mine.items():
        own = [task for task in having if owners.get(task) in group.names]
        if own:
            before_items = {task: _items(found, owners[task], task, form) for task in own}
            instances.append(Instance(before_items, {task: _items(found, label, task, form) for task in own}))
    judged = judge(instances, seed) if instances else {"merge_fail": {}, "mean_drop": None}
    if len(instances) == 1:
        notes.append(_ONE_MERGE)
    return {"tasks": tasks, "kept": kept, **judged, "instances": len(instances), "notes": notes}


def page_evaluation(record: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Return a rule's verdicts as the page of a merge report shows them: both forms, MergeFail by the scores."""
    tasks, notes = {}, []
    verdicts = record["verdicts"][method]
    for form, judged in verdicts.items():
        for task, row in {**judged["tasks"], **judged["kept"]}.items():
            whose = "" if task in judged["tasks"] else ", base"
            tasks[record["tasks"][task]["title"] + ("" if form == "score" else ", likelihood") + whose] = row
        notes += [note for note in judged["notes"] if note not in notes]
    shown = verdicts["score"] if verdicts["score"]["merge_fail"] else verdicts["likelihood"]
    if any(judged["kept"] for judged in verdicts.values()):
        notes.append(
            "Tasks marked “base” are of none of the adapters: their score before is the base model's."
        )
    for form, judged in verdicts.items():
        fails = ", ".join(f"{row['share']:.0%} at τ = {tau}" for tau, row in judged["merge_fail"].items())
        if judged["instances"] == 1 and fails:
            notes.append(f"By {form}, the merge fails in this share of redrawn sets of items: {fails}.")
    return {
        "tasks": tasks,
        "merge_fail": shown["merge_fail"],
        "mean_drop": shown["mean_drop"],
        "notes": notes,
    }


def _items(found: Mapping[str, Any], run: str, task: str, form: str) -> list[float]:
    return found["runs"][run][task][form]["items"]


def _best(runs: Mapping[str, Any], names: Sequence[str], task: str, form: str) -> str:
    return max(names, key=lambda name: float(np.mean(runs[name][task][form]["items"])))


def _change(found: Mapping[str, Any], task: str, form: str, before: str, after: str) -> dict[str, Any]:
    rows = found["differences"][task][form]
    row = next(row for row in rows if row["of"] == after and row["against"] == before)
    return {
        "metric": found["tasks"][task]["metrics"][form],
        "before": found["runs"][before][task][form]["estimate"],
        "after": found["runs"][after][task][form]["estimate"],
        "difference": {key: row[key] for key in ("estimate", "low", "high", "p")},
    }
