"""What a merge of adapters breaks: each adapter alone and merged with the others, on the same items of a suite."""

import itertools
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hiplora.adapters import AdapterUpdate, BaseWeights, load_for, read_update
from hiplora.data.texts import drift_texts
from hiplora.errors import ConfigError
from hiplora.evaluation.drift import rounding
from hiplora.evaluation.evaluate import FORMS, EvalSettings, Scoring, judge
from hiplora.evaluation.mounting import BASE, applied, mounted, name_adapters, unfit_extras
from hiplora.evaluation.suite import Suite, read_suite
from hiplora.evaluation.updates import measure_updates
from hiplora.files import Inputs, check_output_dir, staged_dir
from hiplora.merging import find_rule
from hiplora.merging.conflict import merge_report
from hiplora.merging.merger import check_weights, merge
from hiplora.models import load_tokenizer, resolve

log = logging.getLogger(__name__)
_NO_OWNERS = (
    "No adapter was given as TASK=FOLDER: each task counts for the adapter that is best at it, which makes the scores "
    "before the merge look slightly better than they are."
)
_ONE_MERGE = "MergeFail is of one merge, which fails or does not."
_BEYOND = 1.1  # times the limit of adapters that agree: no verdict rests on rounding
_SCORES = ("task", "metric", "before, of", "before", "after", "difference")
# Measures of the merge report as tables name them.
_CONFLICT = {
    "shared": "modules that two adapters change",
    "left": "outputs in common",
    "right": "inputs in common",
    "left_chance": "… by chance (outputs)",
    "right_chance": "… by chance (inputs)",
    "norm_ratio": "norm of the sum ÷ sum of the norms",
    "unrelated": "… of unrelated updates",
    "sign_conflict": "share that cancels",
}
Group = tuple[str, tuple[str, ...]]  # a rule, and the names of the adapters that it merges


@dataclass(frozen=True)
class MergeSettings:
    """How adapters are merged (as `hiplora.merging.merge`), and which merges are judged.

    `methods` are rules, judged side by side; an option goes to the rules that have it. `sizes` adds every merge of so
    many of the adapters to that of all.
    """

    methods: Sequence[str] = ("addition",)
    weights: Sequence[float] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None
    base: str | None = None
    sizes: Sequence[int] = ()


def merge_check(
    adapters: Sequence[str | os.PathLike],
    settings: EvalSettings,
    how: MergeSettings,
    out: str | os.PathLike,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Score adapters alone and merged on the same items, and judge what the merge broke.

    `adapters` are folders over one base, each alone or as TASK=FOLDER, which names the task that it was trained for.
    The folder `out` gets merge-check.json and report.html, with where the adapters conflict. The scores so far are
    kept beside it, so that the same call goes on where it stopped. ConfigError, DataError or AdapterError names what
    cannot be used before anything is scored.

    Returns a record for JSON: `tasks`, `runs` and `differences` as of `hiplora eval`, a rule's name being its merge of
    all; and by rule and form `verdicts`: `tasks` (an owner's score before, the merge's after, the difference with its
    interval), `kept` (the same for the tasks of no adapter, before being the base's), `merge_fail` over τ and
    `mean_drop` over the rule's merges, `instances` (how many merges those are) and `notes`.
    """
    named, suite = name_adapters(adapters), read_suite(settings.suite, settings.folder)
    weights = dict(zip(named, check_weights(how.weights, len(named)), strict=True))
    groups = _groups(list(named), how, suite)
    updates = {name: read_update(folder, how.base) for name, folder in named.items()}
    model = how.base or next(iter(updates.values())).base
    inputs: Inputs = {"the base model": model, "the suite": settings.suite, "the data": settings.folder}
    check_output_dir(out, overwrite, {**inputs, **{f"adapter {name}": folder for name, folder in named.items()}})
    merges = {}
    for label, (method, names) in groups.items():
        options = {name: value for name, value in how.options.items() if name in find_rule(method).defaults}
        parts, part_weights = [updates[name] for name in names], [weights[name] for name in names]
        merges[label] = merge(parts, method, part_weights, base=how.base, rank=how.rank, options=options)
    owners = {task.name: task.name for task in suite.tasks if task.name in named}
    if owners:
        tasks = ", ".join(task.name for task in suite.tasks)
        for name in (name for name in named if name not in owners):
            log.warning(
                "adapter %s: no task of the suite has this name (%s), so it counts as trained for none", name, tasks
            )
    how_merged = [weights, dict(how.options), how.rank, how.base]
    scoring = Scoring("merge-check", model, named, suite, settings, Path(out), merge=how_merged)
    network, merged = scoring.network, merges[how.methods[0]]
    scoring.check({merged.source: applied(network, merged)})
    for name in (BASE, *named):
        scoring.add(name, mounted(network, named.get(name)))
    for label, (_, names) in groups.items():
        # The merge of a part of the adapters is scored on their tasks only.
        scoring.add(label, applied(network, merges[label]), None if label in how.methods else names)
    record = scoring.results((BASE, *named, *groups))
    record["merge"] = {name: value for name, value in asdict(how).items() if name not in ("base", "sizes")}
    record["verdicts"] = {
        method: {form: _verdict(record, owners, groups, method, form, settings.seed) for form in FORMS}
        for method in how.methods
    }
    report = merge_report(updates, list(weights.values()), record["merge"])
    with staged_dir(out, overwrite) as folder:
        (folder / "merge-check.json").write_text(json.dumps(record, indent=1))
        save_merge_page(folder / "report.html", report, record)
    scoring.store.remove()
    return record


def _groups(names: Sequence[str], how: MergeSettings, suite: Suite) -> dict[str, Group]:
    """Return the merges by label: of each rule that of all, under its name, and every choice of each of `sizes`."""
    # An option that no rule has is an error of the first.
    defined = {name for method in how.methods for name in find_rule(method).defaults}
    find_rule(how.methods[0]).options({name: value for name, value in how.options.items() if name not in defined})
    if len(names) < 2:
        raise ConfigError(f"{len(names)} adapter given; a merge needs at least two")
    if ambiguous := set(names) & set(how.methods):
        raise ConfigError(f"adapter {min(ambiguous)!r}: has the name of a merge rule; give it another, as NAME=FOLDER")
    tasks = sorted(task.name for task in suite.tasks)
    if how.sizes and (without_task := [name for name in names if name not in tasks]):
        raise ConfigError(
            f"--sizes: needs every adapter as TASK=FOLDER with a task of the suite ({', '.join(tasks)}); "
            f"{without_task[0]} is none"
        )
    groups: dict[str, Group] = {method: (method, tuple(names)) for method in how.methods}
    for method, size in itertools.product(how.methods, how.sizes):
        if not 2 <= size <= len(names):
            raise ConfigError(f"--sizes: {size} of {len(names)} adapters; expected 2 to {len(names)}")
        if size < len(names):
            for chosen in itertools.combinations(names, size):
                groups[f"{method}: {' + '.join(chosen)}"] = method, chosen
    return groups


def _verdict(
    record: Mapping[str, Any],
    owners: Mapping[str, str],
    groups: Mapping[str, Group],
    method: str,
    form: str,
    seed: int,
) -> dict[str, Any]:
    """Judge a rule's merges by one form of the scores in the record of a check.

    `owners` says which run was trained for a task; if empty, each task belongs to the adapter that is best at it.
    """
    runs, notes = record["runs"], []
    scored = [task for task in record["tasks"] if form in runs[method].get(task, {})]
    if not owners:
        names = groups[method][1]
        owners = {
            task: max(names, key=lambda name: float(np.mean(runs[name][task][form]["items"]))) for task in scored
        }
        notes.append(_NO_OWNERS)
    rows: dict[str, dict[str, Any]] = {"tasks": {}, "kept": {}}
    for task in scored:
        before = owners.get(task, BASE)
        pair = {"of": method, "against": before}
        row = next(row for row in record["differences"][task][form] if pair.items() <= row.items())
        rows["tasks" if task in owners else "kept"][task] = {
            "before_of": before,
            "metric": record["tasks"][task]["metrics"][form],
            "before": runs[before][task][form]["estimate"],
            "after": runs[method][task][form]["estimate"],
            "difference": {key: row[key] for key in ("estimate", "low", "high", "p")},
        }
    merges = []
    for label, (rule, names) in groups.items():
        tasks = [task for task in scored if owners.get(task) in names]
        if rule == method and tasks:
            alone = {task: runs[owners[task]][task][form]["items"] for task in tasks}
            merges.append((alone, {task: runs[label][task][form]["items"] for task in tasks}))
    judged = judge(merges, seed) if merges else {"merge_fail": {}, "mean_drop": None}
    if len(merges) == 1:
        notes.append(_ONE_MERGE)
    return {**rows, **judged, "instances": len(merges), "notes": notes}


def verdict_notes(record: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each rule and form of scores, what the merge broke, then the notes, each once."""
    sentences, notes = [], []
    for method, forms in record["verdicts"].items():
        for form, judged in forms.items():
            lost = [
                record["tasks"][task]["title"]
                for task, row in judged["tasks"].items()
                if row["difference"]["high"] < 0
            ]
            change = f"lower on {', '.join(lost)}" if lost else "clearly lower on none"
            sentences.append(
                f"{method}, by {form}: {change}, of {len(judged['tasks'])} tasks that its adapters were for."
            )
            notes += judged["notes"]
    return [*sentences, *dict.fromkeys(notes)]


def verdict_tables(record: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """Return a check's verdicts, caption → table: scores before and after, and MergeFail, per rule."""
    from hiplora.reporting import interval

    def cell(measure: Mapping[str, float], scale: float = 1, digits: int = 1) -> str:
        estimate, low, high = (scale * measure[key] for key in ("estimate", "low", "high"))
        return interval(estimate, low, high, digits)

    tables = {}
    for method, forms in record["verdicts"].items():
        scores, failing = [], []
        for form, judged in forms.items():
            for task, row in {**judged["tasks"], **judged["kept"]}.items():
                cells = row["before_of"], f"{row['before']:.1f}", f"{row['after']:.1f}", cell(row["difference"])
                scores.append((record["tasks"][task]["title"], row["metric"], *cells))
            for tau, row in judged["merge_fail"].items():
                failing.append((form, f"MergeFail at τ = {tau}, %", cell(row, 100, 0)))
            if judged["mean_drop"] is not None:
                failing.append((form, "mean |drop|, pp", cell(judged["mean_drop"])))
        caption = f"{method}: scores before and after, per cent, 95 % intervals"
        tables[caption] = pd.DataFrame(scores, columns=list(_SCORES))
        merges = max(judged["instances"] for judged in forms.values())
        tables[f"{method}: {merges} merges"] = pd.DataFrame(failing, columns=["form", "measure", "value"])
    return tables


def drift_of_merge(
    updates: Mapping[str, AdapterUpdate], weights: Sequence[float], merged: AdapterUpdate, device: str = "auto"
) -> dict[str, Any] | None:
    """Measure how far a merge, and each adapter alone at its weight, drift from the base, and judge that.

    Returns `drift` (name → text → drift; the merge is `merge`) and `verdict`, a sentence; None if `drift_problem`.

    Small changes that agree in nothing add their KL divergences; T that agree in everything have T times the sum, and
    large ones the mean of what each has at T times its size (KL is convex in the logits). A merge beyond both breaks
    something that none of its parts does.
    """
    if drift_problem(merged, device):
        return None
    tokenizer = load_tokenizer(merged.base)
    weighted = zip(updates.items(), weights, strict=True)
    alone = {name: merge([update], weights=[weight]) for (name, update), weight in weighted if weight}
    model, measured = load_for(merged, device), {**alone, "merge": merged}
    texts = drift_texts()
    drift, _ = measure_updates(model, tokenizer, measured, texts, may_be_nothing=measured)
    ratios = {}
    for text, of_merge in drift["merge"].items():
        parts = sum(drift[name][text]["kl"] for name in alone)
        ratios[text] = of_merge["kl"] / max(parts, rounding(model))
    text, worst = max(ratios.items(), key=lambda item: item[1])
    kl, changed = (drift["merge"][text][key] for key in ("kl", "greedy_changed"))
    judged = "they change the same things; smaller --weights or --scale keep more of the base."
    if worst <= 1.5:
        judged = "they hardly disturb each other."
    elif worst > len(alone):
        larger = {name: update.scaled(len(alone)) for name, update in alone.items()}
        agreeing, _ = measure_updates(model, tokenizer, larger, {text: texts[text]}, may_be_nothing=larger)
        if kl > _BEYOND * sum(drifts[text]["kl"] for drifts in agreeing.values()) / len(alone):
            judged = "it breaks what none of them does. See hiplora merge-check and hiplora protect."
    comparison = f", {worst:.2g} times what the adapters drift alone, added up: {judged}"
    if len(alone) == 1:
        comparison = "."
    elif kl < rounding(model):
        comparison = f", no more than rounding: {judged}"
    verdict = (
        f"The merge drifts {kl:.2g} nats per token from the base on {text} ({changed:.1%} of its top tokens change)"
        f"{comparison}"
    )
    return {"drift": drift, "verdict": verdict}


def drift_problem(update: AdapterUpdate, device: str = "auto") -> str:
    """Return why the drift of an update from its base cannot be measured; empty if it can."""
    if not os.path.isdir(resolve(update.base)):
        return f"base model {update.base or '?'} is no folder on this machine"
    weights = BaseWeights.of(update)
    if not weights.skeleton.can_generate() or weights.config.is_encoder_decoder:
        return f"base model {update.base} writes no text by itself"
    if unfit := unfit_extras(weights.skeleton, update):
        return f"{unfit[0]} has another shape than the base model's"
    try:
        load_tokenizer(update.base)
    except ConfigError as error:
        return str(error)
    return weights.no_room(device)


def conflict_table(report: Mapping[str, Any]) -> pd.DataFrame:
    """Return the modules that conflict most, worst first."""
    columns = ["module", "score", "norm_ratio", "unrelated", "sign_conflict"]
    modules = pd.DataFrame(report["modules"], columns=columns).set_index("module", drop=False)
    return modules.loc[report["most_conflicting"]].reset_index(drop=True).rename(columns=_CONFLICT)


def save_merge_page(
    path: str | os.PathLike, report: Mapping[str, Any], check: Mapping[str, Any] | None = None
) -> Path:
    """Write the page of a merge: where its adapters conflict and, with a record of `merge_check`, what it broke."""
    from hiplora.reporting import plots
    from hiplora.reporting.html import Section, save_page

    sections, figures = [], {}
    if check is not None:
        sections.append(Section("What the merge broke", "\n\n".join(verdict_notes(check)), verdict_tables(check)))
    names = [adapter["name"] for adapter in report["adapters"]]
    scores = pd.DataFrame(report["modules"]).dropna(subset=["score", "layer"])
    if len(scores):
        grid = scores.pivot_table(index="layer", columns="type", values="score", aggfunc="max")
        figures["Conflict of the worst pair, by layer and module"] = plots.heatmap(grid, vmin=0, vmax=1)
    tables = {"Adapters": pd.DataFrame(report["adapters"]).drop(columns=["sha256"])}
    if report["most_conflicting"]:
        cosines = pd.DataFrame(report["cosine"], index=names, columns=names)
        tables["Mean cosine of two adapters' updates"] = cosines.astype(float)
        tables["Modules that conflict most"] = conflict_table(report)
        tables["All modules together, beside what unrelated updates would give"] = pd.DataFrame(
            {_CONFLICT.get(name, name): value for name, value in report["totals"].items()}.items(),
            columns=["measure", "value"],
        )
    text = (
        "The score is 0 where two updates act on different directions or agree, 1/2 where unrelated updates act on "
        "the same directions, 1 where they are opposites. Adapters trained with one seed start from the same inputs: "
        "they read from the same directions without being in each other's way."
    )
    if not report["most_conflicting"]:
        text = "No module is changed by two adapters."
    if drift := report["merge"].get("drift"):
        text = f"{drift['verdict']}\n\n{text}"
    sections.append(Section("Where the adapters conflict", text, tables, figures))
    title = f"Merge of {len(names)} adapter{'s' if len(names) != 1 else ''}"
    return save_page(path, title, sections, subtitle=report["base"], provenance=report["provenance"])
