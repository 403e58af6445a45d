"""What a merge of adapters breaks: each adapter alone and merged with the others, on the same items of a suite."""

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hiplora import __version__
from hiplora.adapters import Update, check_out, read_update
from hiplora.errors import ConfigError
from hiplora.evaluation.evaluate import EvalSettings, Partial, collect
from hiplora.evaluation.judgement import Instance, judge
from hiplora.evaluation.mounting import (
    BASE,
    applied,
    check_acts,
    check_adapters,
    load_model,
    mounted,
    name_adapters,
    probe,
)
from hiplora.evaluation.suite import Suite
from hiplora.files import check_output_dir, staged_dir
from hiplora.merging import find_rule
from hiplora.merging.conflict import merge_report
from hiplora.merging.merger import merge
from hiplora.provenance import folder_identity, json_sha256, provenance

FORMS = ("score", "likelihood")
_NO_OWNERS = (
    "No adapter was given as TASK=FOLDER: each task counts for the adapter that is best at it, which makes the scores "
    "before the merge look slightly better than they are."
)
_ONE_MERGE = "MergeFail is of one merge, which fails or does not."


@dataclass(frozen=True)
class Group:
    """Adapters that are merged by a rule; `whole` where it is all of them."""

    method: str
    names: tuple[str, ...]
    whole: bool


@dataclass(frozen=True)
class MergeSettings:
    """How adapters are merged (as `hiplora.merging.merge`), and which merges are judged.

    `methods` are rules, judged side by side; an option goes to the rules that have it. `sizes` adds every merge of so
    many of the adapters to that of all: what MergeFail is counted over.
    """

    methods: Sequence[str] = ("addition",)
    weights: Sequence[float] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None
    base: str | None = None
    sizes: Sequence[int] = ()

    def __post_init__(self) -> None:
        rules = [find_rule(method) for method in self.methods]
        if not rules:
            raise ConfigError("--method: names no rule; pass at least one")
        for name in self.options:
            if not any(name in rule.defaults for rule in rules):
                rules[0].options({name: self.options[name]})  # says which options there are
        for rule in rules:
            rule.options(self.options_of(rule.name))

    def options_of(self, method: str) -> dict[str, Any]:
        """Return the given options that a rule has."""
        return {name: value for name, value in self.options.items() if name in find_rule(method).defaults}

    def merge(self, updates: Mapping[str, Any], group: Group) -> Any:
        """Merge a group's adapters, each with its own weight."""
        weights = dict(zip(updates, self.weights, strict=True)) if self.weights else None
        return merge(
            [updates[name] for name in group.names],
            group.method,
            [weights[name] for name in group.names] if weights else None,
            base=self.base,
            rank=self.rank,
            options=self.options_of(group.method),
        )


def merge_check(
    adapters: Sequence[str | os.PathLike],
    settings: EvalSettings,
    how: MergeSettings | None = None,
    *,
    merged: Update | None = None,
    partial: str | os.PathLike | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Score adapters alone and merged on the same items, and judge what the merge broke.

    Args:
        adapters: folders over one base, each alone or as TASK=FOLDER, which names the task that it was trained for.
        settings: suite and items.
        how: the merge.
        merged: the merge of all, where it is not what `how` makes of them.
        partial: file beside which the scores so far are kept, so that the same call goes on where it stopped.
        progress: whether to show progress bars.

    Returns:
        a JSON-ready record (schema 1, kind `merge-check`): `tasks`, `runs` and `differences` as in a results file of
        `hiplora eval`, a rule's name being its merge of all; and `verdicts`, a rule and form, as `verdict` returns
        them.

    Raises:
        ConfigError, DataError, AdapterError: what cannot be used; all of it before anything is scored.
    """
    how = how or MergeSettings()
    named, suite = name_adapters(adapters), settings.read_suite()
    owners = {task.name: task.name for task in suite.tasks if task.name in named}
    updates = {name: read_update(folder, how.base) for name, folder in named.items()}
    if how.weights and len(how.weights) != len(named):
        raise ConfigError(f"weights: {len(how.weights)} given for {len(named)} adapters; pass one each")
    groups = _groups(list(named), how, suite)
    given = {how.methods[0]: merged} if merged is not None else {}
    merges = {label: given.get(label) or how.merge(updates, group) for label, group in groups.items()}
    engine = settings.engine(suite)
    model = how.base or updates[next(iter(named))].base
    network, tokenizer = load_model(model)
    check_adapters(network, tokenizer, engine.prompts(), named)
    _check_merges(network, tokenizer, engine.prompts(), merges)
    plan = _plan(model, named, how, settings, engine.describe(), merged)
    store = Partial(Path(partial) if partial else None, plan)
    for label in (BASE, *named, *groups):
        if label not in store.runs:
            part = label in groups and not groups[label].whole
            tasks = list(groups[label].names) if part else None
            with _present(network, label, named, merges) as there:
                store.add(label, engine.score(there, tokenizer, settings.batch_size, tasks, progress))
    found = collect(engine.describe(), store.runs, store.names)
    record = {
        "schema": 1,
        "kind": "merge-check",
        "model": model,
        "suite": suite.name,
        "limit": settings.limit,
        "seed": settings.seed,
        "adapters": {name: str(folder) for name, folder in named.items()},
        "merge": {
            "methods": list(how.methods),
            "weights": list(how.weights) if how.weights else None,
            "options": dict(how.options),
            "rank": how.rank,
        },
        **found,
        "verdicts": {
            method: {form: verdict(found, owners, groups, method, form, settings.seed) for form in FORMS}
            for method in how.methods
        },
        "provenance": provenance(plan_sha256=json_sha256(plan)),
    }
    store.remove()
    return record


def write_merge_check(
    adapters: Sequence[str | os.PathLike],
    settings: EvalSettings,
    how: MergeSettings,
    out: str | os.PathLike,
    *,
    overwrite: bool = False,
    progress: bool = False,
    wrap: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> dict[str, Any]:
    """Check a merge and write the folder: merge-check.json and report.html, with where the adapters conflict.

    Returns the record.

    Raises:
        ConfigError, DataError, AdapterError: as `merge_check`, or `out` exists. Nothing is written then.
    """
    path = check_output_dir(out, overwrite)
    named = name_adapters(adapters)
    for folder in named.values():
        check_out(path, overwrite, str(folder))
    record = merge_check(adapters, settings, how, partial=path, progress=progress)
    updates = [replace(read_update(folder, how.base), source=name) for name, folder in named.items()]
    report = merge_report(updates, how.weights or [1.0] * len(updates), record["merge"], wrap=wrap)
    with staged_dir(path, overwrite) as folder:
        (folder / "merge-check.json").write_text(json.dumps(record, indent=1))
        save_merge_page(folder / "report.html", report, record)
    return record


def _groups(names: Sequence[str], how: MergeSettings, suite: Suite) -> dict[str, Group]:
    """Return the merges by label: of each rule that of all, under its name, and every choice of each of `sizes`."""
    if len(names) < 2:
        raise ConfigError(f"{len(names)} adapter given; a merge needs at least two")
    if taken := set(names) & set(how.methods):
        raise ConfigError(
            f"adapter {taken.pop()!r}: has the name of a merge rule; give it another, as NAME=FOLDER"
        )
    known = {task.name for task in suite.tasks}
    if how.sizes and (strangers := [name for name in names if name not in known]):
        raise ConfigError(
            f"--sizes: needs every adapter as TASK=FOLDER with a task of the suite ({', '.join(sorted(known))}); "
            f"{strangers[0]} is none"
        )
    groups = {method: Group(method, tuple(names), True) for method in how.methods}
    for method, size in itertools.product(how.methods, how.sizes):
        if not 2 <= size <= len(names):
            raise ConfigError(f"--sizes: {size} of {len(names)} adapters; expected 2 to {len(names)}")
        for chosen in itertools.combinations(names, size):
            if size < len(names):
                groups[f"{method}: {' + '.join(chosen)}"] = Group(method, chosen, False)
    return groups


@contextlib.contextmanager
def _present(
    network: Any, label: str, named: Mapping[str, Path], merges: Mapping[str, Update]
) -> Iterator[Any]:
    """Yield the model of a run: bare, with an adapter, or with a merge added to its weights."""
    if label == BASE:
        yield network
    elif label in named:
        with mounted(network, named[label]) as adapted:
            yield adapted
    else:
        with applied(network, merges[label]) as changed:
            yield changed


def _check_merges(network: Any, tokenizer: Any, prompts: Sequence[str], merges: Mapping[str, Update]) -> None:
    base = probe(network, tokenizer, prompts)
    label, update = next(iter(merges.items()))
    with applied(network, update) as changed:
        on = probe(changed, tokenizer, prompts)
    check_acts(base, on, probe(network, tokenizer, prompts), label)


def _plan(
    model: str,
    named: Mapping[str, Path],
    how: MergeSettings,
    settings: EvalSettings,
    tasks: Mapping[str, Any],
    merged: Update | None,
) -> dict[str, Any]:
    """Return what makes two calls the same check."""
    return {
        "kind": "merge-check",
        "hiplora": __version__,
        "model": [model, folder_identity(model)],
        "adapters": {name: folder_identity(folder) for name, folder in named.items()},
        "merge": [how.weights, dict(how.options), how.rank, how.base],
        "merged": merged.source if merged is not None else None,
        "tasks": dict(tasks),
        "seed": settings.seed,
    }


# Verdicts ------------------------------------------------------------------------------------------------------


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
    scored = [task for task in found["tasks"] if form in found["runs"][method].get(task, {})]

    def items(run: str, task: str) -> list[float]:
        return found["runs"][run][task][form]["items"]

    notes = []
    if not owners:
        names = mine[method].names
        owners = {task: max(names, key=lambda name: float(np.mean(items(name, task)))) for task in scored}
        notes.append(_NO_OWNERS)
    tasks: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    for task in scored:
        before = owners.get(task, BASE)
        (tasks if task in owners else kept)[task] = _change(found, task, form, before, method)
    instances = []
    for label, group in mine.items():
        own = [task for task in scored if owners.get(task) in group.names]
        if own:
            before_items = {task: items(owners[task], task) for task in own}
            instances.append(Instance(before_items, {task: items(label, task) for task in own}))
    judged = judge(instances, seed) if instances else {"merge_fail": {}, "mean_drop": None}
    if len(instances) == 1:
        notes.append(_ONE_MERGE)
    return {"tasks": tasks, "kept": kept, **judged, "instances": len(instances), "notes": notes}


def _change(found: Mapping[str, Any], task: str, form: str, before: str, after: str) -> dict[str, Any]:
    rows = found["differences"][task][form]
    row = next(row for row in rows if row["of"] == after and row["against"] == before)
    return {
        "before_of": before,
        "metric": found["tasks"][task]["metrics"][form],
        "before": found["runs"][before][task][form]["estimate"],
        "after": found["runs"][after][task][form]["estimate"],
        "difference": {key: row[key] for key in ("estimate", "low", "high", "p")},
    }


def verdict_notes(record: Mapping[str, Any]) -> list[str]:
    """Return the notes of a check's verdicts, each once."""
    judged = [one for forms in record["verdicts"].values() for one in forms.values()]
    return list(dict.fromkeys(note for one in judged for note in one["notes"]))


def verdict_tables(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a check's verdicts as DataFrames, caption → table: scores before and after, and MergeFail, per rule."""
    import pandas as pd

    from hiplora.reporting import interval

    tables = {}
    for method, forms in record["verdicts"].items():
        rows = [
            {
                "task": record["tasks"][task]["title"],
                "metric": row["metric"],
                "before, of": row["before_of"],
                "before": f"{row['before']:.1f}",
                "after": f"{row['after']:.1f}",
                "difference": interval(*(row["difference"][key] for key in ("estimate", "low", "high"))),
            }
            for judged in forms.values()
            for task, row in {**judged["tasks"], **judged["kept"]}.items()
        ]
        tables[f"{method}: scores before and after, per cent, 95 % intervals"] = pd.DataFrame(rows)
        fails: list[dict[str, Any]] = []
        for form, judged in forms.items():
            for tau, row in judged["merge_fail"].items():
                shown = interval(*(100 * row[key] for key in ("estimate", "low", "high")), digits=0)
                fails.append({"form": form, "measure": f"MergeFail at τ = {tau}, %", "value": shown})
            if (drop := judged["mean_drop"]) is not None:
                shown = interval(*(drop[key] for key in ("estimate", "low", "high")))
                fails.append({"form": form, "measure": "mean |drop|, pp", "value": shown})
        tables[f"{method}: {forms['score']['instances'] or forms['likelihood']['instances']} merges"] = (
            pd.DataFrame(fails)
        )
    return tables


# The page ------------------------------------------------------------------------------------------------------


def conflict_table(report: Mapping[str, Any]) -> Any:
    """Return the modules that conflict most as a DataFrame, worst first."""
    import pandas as pd

    by_name = {row["module"]: row for row in report["modules"]}
    columns = ("score", "norm_ratio", "unrelated", "sign_conflict")
    rows = [by_name[name] for name in report["most_conflicting"]]
    return pd.DataFrame([{"module": row["module"], **{key: row[key] for key in columns}} for row in rows])


def save_merge_page(
    path: str | os.PathLike, report: Mapping[str, Any], check: Mapping[str, Any] | None = None
) -> Path:
    """Write the page of a merge: where its adapters conflict and, with a record of `merge_check`, what it broke."""
    import pandas as pd

    from hiplora.reporting import Section, plots, save_page

    names = [adapter["name"] for adapter in report["adapters"]]
    sections = []
    if check is not None:
        notes = [
            note
            for forms in check["verdicts"].values()
            for judged in forms.values()
            for note in judged["notes"]
        ]
        sections.append(
            Section("What the merge broke", "\n\n".join(dict.fromkeys(notes)), verdict_tables(check))
        )
    modules = pd.DataFrame(report["modules"])
    scores = modules.dropna(subset=["score", "layer"])
    figures = {}
    if len(scores):
        grid = scores.pivot_table(index="layer", columns="type", values="score", aggfunc="max")
        figures["Conflict of the worst pair, by layer and module"] = plots.heatmap(grid, vmin=0, vmax=1)
    tables = {"Adapters": pd.DataFrame(report["adapters"]).drop(columns=["sha256"])}
    if len(names) > 1:
        cosines = pd.DataFrame(report["pairs"]["cosine"], index=names, columns=names)
        tables["Mean cosine of two adapters' updates"] = cosines.astype(float)
        tables["Modules that conflict most"] = conflict_table(report)
        tables["All modules together, beside what unrelated updates would give"] = pd.DataFrame(
            [report["totals"]]
        )
    text = (
        "The score is 0 where two updates act on different directions or agree, 1/2 where unrelated updates act on "
        "the same directions, 1 where they are opposites."
    )
    sections.append(Section("Where the adapters conflict", text, tables, figures))
    title = f"Merge of {len(names)} adapter{'s' if len(names) != 1 else ''}"
    return save_page(path, title, sections, subtitle=report["base"], provenance=report["provenance"])
