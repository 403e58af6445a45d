"""What a merge of adapters breaks: each adapter alone and merged with the others, on the same items of a suite."""

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hiplora import __version__
from hiplora.adapters import Update, check_out, read_update
from hiplora.errors import ConfigError
from hiplora.evaluation.evaluate import EvalSettings, Partial, collect
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
from hiplora.merging import merge
from hiplora.merging.registry import rule as find_rule
from hiplora.merging.report import merge_report
from hiplora.provenance import folder_identity, json_sha256, provenance
from hiplora.reporting.merge_page import render_merge_html
from hiplora.study.merge_verdict import Group, page_evaluation, verdict

# Called with what is done and how much it is; returns what is called with each part that is finished.
Progress = Callable[[str, int], Callable[[int], None]]
FORMS = ("score", "likelihood")


@dataclass(frozen=True)
class MergeSettings:
    """How adapters are merged (as `hiplora.merging.merge`), and which merges are judged.

    `methods` are rules, each judged beside the others; an option goes to the rules that have it. `sizes` adds every
    merge of so many of the adapters to that of all: what MergeFail is counted over.
    """

    methods: Sequence[str] = ("addition",)
    weights: Sequence[float] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None
    base: str | None = None
    sizes: Sequence[int] = ()

    def __post_init__(self) -> None:
        """Refuse rules that are not known, and options that none of them has."""
        rules = [find_rule(method) for method in self.methods]
        if not rules:
            raise ConfigError("--method: names no rule; pass at least one")
        for name in self.options:
            if not any(name in rule.defaults for rule in rules):
                rules[0].make_options({name: self.options[name]})  # says which options there are
        for rule in rules:
            rule.make_options(self.options_of(rule.name))

    def options_of(self, method: str) -> dict[str, Any]:
        """Return the options that a rule has, as far as they are given."""
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
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score adapters alone and merged on the same items, and judge what the merge broke.

    Args:
        adapters: folders over one base, each alone or as TASK=FOLDER, which says what it was trained for.
        settings: suite and items.
        how: the merge.
        merged: the merge of all, where it is not what `how` makes of them.
        partial: file beside which the scores so far are kept, so that the same call goes on where it stopped.
        progress: for a progress bar.

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
                store.add(label, engine.score(there, tokenizer, settings.batch_size, tasks, bool(progress)))
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
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Check a merge and write the folder: merge-check.json, and a page for each rule with how the adapters conflict.

    The page is report.html, or with several rules report-RULE.html. Returns the record.

    Raises:
        ConfigError, DataError, AdapterError: as `merge_check`, or `out` exists. Nothing is written then.
    """
    path = check_output_dir(out, overwrite)
    named = name_adapters(adapters)
    for folder in named.values():
        check_out(path, overwrite, str(folder))
    record = merge_check(adapters, settings, how, partial=path, progress=progress)
    updates = {name: replace(read_update(folder, how.base), source=name) for name, folder in named.items()}
    tick = (
        progress("how the adapters conflict", len({m for u in updates.values() for m in u.factors}))
        if progress
        else None
    )
    conflicts = merge_report(
        list(updates.values()), how.weights or [1.0] * len(updates), record["merge"], wrap=_ticking(tick)
    )
    with staged_dir(path, overwrite) as folder:
        (folder / "merge-check.json").write_text(json.dumps(record, indent=1))
        for method in how.methods:
            page = render_merge_html({**conflicts, "evaluation": page_evaluation(record, method)})
            (folder / ("report.html" if len(how.methods) == 1 else f"report-{method}.html")).write_text(page)
    return record


def _ticking(tick: Callable[[int], None] | None) -> Callable[[Iterable[str]], Iterable[str]]:
    def through(items: Iterable[str]) -> Iterator[str]:
        for item in items:
            yield item
            if tick:
                tick(1)

    return through


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
    """Yield the model as a run sees it: bare, with an adapter on, or with a merge added to its weights."""
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
    """What makes two calls the same check."""
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
