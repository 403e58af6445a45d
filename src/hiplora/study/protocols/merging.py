"""The adapters of all domains merged: before, after, and their difference, as in Tables 2 and 13 of the paper."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hiplora.recipes.protocols import Merging
from hiplora.reporting.study.paper import paper_value
from hiplora.reporting.study.spec import Measurement, Section, Table
from hiplora.study.builder import Study
from hiplora.study.engine.jobs import Job
from hiplora.study.protocols.drifts import drift_measurements, drift_table, drifts
from hiplora.study.protocols.merges import full_merges, merge_of, rule_title
from hiplora.study.protocols.reported import Reported, passing, reported
from hiplora.study.protocols.show import NONE, cell, difference, form_told, marked, measurement, smallest_told
from hiplora.study.results import FORMS, Results
from hiplora.study.statistics import Draws, Resampler, estimate

NAME, TITLE = "merging", "Merging the adapters of all domains"


def jobs(study: Study, settings: Merging) -> list[Job]:
    """Merge the adapters of each seed by every rule; score each merge, and each adapter, on the domains' tasks."""
    found: list[Job] = []
    for method in settings.methods:
        for seed in study.seeds(settings):
            alone = _alone(study, settings, method, seed)
            found += [job for own, further in alone.values() for job in (own, *further)]
            for rule in settings.rules:
                merge, further = _merged(study, settings, method, rule, seed)
                found += [merge, *further]
    return found


def section(study: Study, settings: Merging, results: Results) -> Section:
    """Tables of before, after and difference by rule in both forms, of the mean drop of all rules, and of drift."""
    found = {form: _merges(study, settings, results, form) for form in FORMS}
    tables = [
        _table(study, settings, [one for one in merges if one.rule == rule], rule, form)
        for rule in settings.rules
        for form, merges in found.items()
    ]
    tables.append(_rules_table(found))
    measurements = [one for form in FORMS for one in _measurements(study, found[form], form)]
    for rule in settings.rules:
        runs = {
            study.row(method).title: [
                _merged(study, settings, method, rule, seed)[0] for seed in study.seeds(settings)
            ]
            for method in settings.methods
        }
        moved = drifts(runs, results)
        if any(moved.values()):
            title = f"Drift of the models merged by {rule_title(rule)}"
            tables.append(drift_table(moved, f"{NAME}-drift-{rule}", title, "seeds"))
            seeds = len(study.seeds(settings))
            measurements += drift_measurements(moved, runs, NAME, seeds, rule=rule)
    texts = [text for form in FORMS for text in _texts(settings, found[form], form)]
    return Section(NAME, TITLE, texts, tables, (), measurements, list(results.missing))


@dataclass(frozen=True)
class Merges:
    """A method's merges by a rule: each reported metric before and after with its replicates, `[metric][seed]`."""

    title: str
    rule: str
    metrics: Sequence[Reported]
    before: list[list[Draws]]
    after: list[list[Draws]]
    jobs: list[Job]

    @property
    def name(self) -> str:
        """The method's and the rule's name, as a row of a table."""
        return f"{self.title}, {rule_title(self.rule)}"

    @property
    def alone(self) -> Draws:
        """The mean score of the adapters before the merge, over all metrics and seeds."""
        return np.mean(self.before, axis=(0, 1))

    @property
    def alone_by_seed(self) -> list[float]:
        """The mean score of each seed's adapters before the merge."""
        return np.asarray(self.before)[..., 0].mean(axis=0).tolist()

    @property
    def drop(self) -> Draws:
        """The mean absolute drop over all metrics and seeds."""
        return np.mean(np.abs(np.subtract(self.before, self.after)), axis=(0, 1))

    @property
    def signed(self) -> Draws:
        """The mean drop with its sign: a gain counts as negative."""
        return np.mean(np.subtract(self.before, self.after), axis=(0, 1))

    @property
    def drop_by_seed(self) -> list[float]:
        """The mean absolute drop of each seed's merge."""
        return np.abs(np.subtract(self.before, self.after))[..., 0].mean(axis=0).tolist()


def _alone(study: Study, settings: Merging, method: str, seed: int) -> dict[str, tuple[Job, list[Job]]]:
    """Domain → the score of its own adapter, and those on the domain's further tasks."""
    found = {}
    for domain in study.recipe.domains:
        adapter = study.adapter(study.row(method), domain, seed)
        further = passing(study, settings, domain)
        more = [study.score(adapter, further, drift=False)] if further else []
        found[domain] = (study.score(adapter), more)
    return found


def _merged(study: Study, settings: Merging, method: str, rule: str, seed: int) -> tuple[Job, list[Job]]:
    """The merge of a seed's adapters, scored on the domains' tasks; and the same on the further ones."""
    row, options = study.row(method), settings.rules[rule]
    merge = merge_of(study, row, full_merges(study, [seed])[0], rule, options)
    further = {
        task: n for domain in study.recipe.domains for task, n in passing(study, settings, domain).items()
    }
    if not further:
        return merge, []
    adapters = {domain: study.adapter(row, domain, seed) for domain in study.recipe.domains}
    name = f"{row.title}, {', '.join(further)}, seed {seed}"
    return merge, [study.merge(adapters, rule, options, further, name=name)]


def _merges(study: Study, settings: Merging, results: Results, form: str) -> list[Merges]:
    """By rule, then method, those all of whose scores are there."""
    draws, found = Resampler(), []
    for rule in settings.rules:
        for method in settings.methods:
            metrics = reported(study, settings, form)
            before: list[list[Draws]] = [[] for _ in metrics]
            after: list[list[Draws]] = [[] for _ in metrics]
            used: dict[Job, None] = {}
            for seed in study.seeds(settings):
                alone = _alone(study, settings, method, seed)
                merged = _merged(study, settings, method, rule, seed)
                for place, metric in enumerate(metrics):
                    for job, kept in (
                        (_of(alone[metric.domain], metric), before),
                        (_of(merged, metric), after),
                    ):
                        used[job] = None
                        result = results.get(job)
                        items = None if result is None else metric.items(result, form)
                        kept[place] += [draws.mean(metric.task, items)] if items is not None else []
            lengths = {len(one) for kept in (before, after) for one in kept}
            if lengths == {len(study.seeds(settings))}:
                title = study.row(method).title
                found.append(Merges(title, rule, metrics, before, after, list(used)))
    return found


def _of(jobs_of: tuple[Job, list[Job]], metric: Reported) -> Job:
    own, further = jobs_of
    return further[0] if metric.further else own


def _table(study: Study, settings: Merging, merges: Sequence[Merges], rule: str, form: str) -> Table:
    metrics, lines = reported(study, settings, form), []
    for one in merges:
        before, after = ([np.mean(draws, axis=0) for draws in kept] for kept in (one.before, one.after))
        paper = paper_value("merge-rules", one.name, "Mean drop") if form == "accuracy" else None
        for title, values, last in (
            ("before", before, NONE),
            ("after", after, NONE),
            ("Δ", np.subtract(after, before), cell(estimate(one.drop, one.drop_by_seed), paper)),
        ):
            lines.append((f"{one.title}, {title}", [*(cell(estimate(draws)) for draws in values), last]))
    columns = ["Method", *(metric.title for metric in metrics), "Mean drop"]
    seeds = ", ".join(map(str, study.seeds(settings)))
    note = (
        f"{form_told(form)}. Before: each domain by its own adapter; after: all of them by the merge of the "
        f"adapters of one seed (mean over the seeds {seeds}). Mean drop: mean of the absolute differences over "
        "metrics and seeds, in percentage points; the scatter of few items does not cancel in it. ±: standard "
        "deviation over seeds. Brackets: 95 % intervals over items."
    )
    return Table(f"{NAME}-{rule}-{form}", f"Merged by {rule_title(rule)}: {form}", columns, lines, note)


def _rules_table(found: Mapping[str, Sequence[Merges]]) -> Table:
    names = dict.fromkeys(one.name for merges in found.values() for one in merges)
    lines = []
    for name in names:
        cells = []
        for form, merges in found.items():
            one = next((one for one in merges if one.name == name), None)
            paper = paper_value("merge-rules", name, "Mean drop") if form == "accuracy" else None
            cells.append(cell(None if one is None else estimate(one.drop, one.drop_by_seed), paper))
            cells.append(cell(None if one is None else estimate(one.signed)))
        lines.append((name, cells))
    columns = ["Merged", *(f"{what}, {form}" for form in found for what in ("Mean drop", "With its sign"))]
    note = (
        "Mean absolute drop over all reported metrics, and the mean drop with its sign (a gain is negative), in "
        "percentage points. ±: standard deviation over seeds. Brackets: 95 % intervals over items."
    )
    best = dict.fromkeys(range(0, 2 * len(found), 2), "low")
    return Table(f"{NAME}-rules", "Mean drop by rule", columns, marked(lines, best), note)


def _measurements(study: Study, merges: Sequence[Merges], form: str) -> Iterator[Measurement]:
    for index, one in enumerate(merges):
        seeds = len(one.drop_by_seed)
        for place, metric in enumerate(one.metrics):
            for when, kept in (("before", one.before[place]), ("after", one.after[place])):
                found = estimate(np.mean(kept, axis=0), [float(draws[0]) for draws in kept])
                setting = {"rule": one.rule, "when": when, "reported": metric.title}
                yield measurement(
                    NAME, one.title, "merge score", found, one.jobs, domain=metric.domain, form=form, unit="%",
                    setting=setting, seeds=seeds,
                )  # fmt: skip
        for name, found in (
            ("mean drop", estimate(one.drop, one.drop_by_seed)),
            ("mean signed drop", estimate(one.signed)),
        ):
            setting = {"rule": one.rule}
            yield measurement(
                NAME, one.title, name, found, one.jobs, form=form, unit="pp", setting=setting, seeds=seeds
            )
        found = estimate(one.alone)
        setting = {"rule": one.rule}
        yield measurement(
            NAME, one.title, "score alone", found, one.jobs, form=form, unit="%", setting=setting, seeds=seeds
        )
        for other in (other for other in merges[:index] if other.rule == one.rule):
            here, there = ((x.title, x.alone, x.jobs) for x in (one, other))
            by_seed = one.alone_by_seed, other.alone_by_seed
            yield difference(
                NAME, "score alone", here, there, by_seed=by_seed, form=form, setting=setting, seeds=seeds
            )
            here, there = ((x.title, x.drop, x.jobs) for x in (one, other))
            by_seed = one.drop_by_seed, other.drop_by_seed
            yield difference(
                NAME, "mean drop", here, there, by_seed=by_seed, form=form, setting=setting, seeds=seeds
            )


def _texts(settings: Merging, merges: Sequence[Merges], form: str) -> Iterator[str]:
    for rule in settings.rules:
        found = [one for one in merges if one.rule == rule]
        if not found:
            continue
        drops = ", ".join(f"{one.drop[0]:.1f} pp with {one.title}" for one in found)
        told = smallest_told([one.drop for one in found])
        yield f"By {form}, merging by {rule_title(rule)} moves the scores by {drops} in the mean. {told}".strip()
