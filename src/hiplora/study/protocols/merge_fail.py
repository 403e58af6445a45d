"""How many merges fail, over their size, the rule and the threshold τ: MergeFail, as in appendix C.3 of the paper."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from hiplora.metrics import MergeInstance, merge_instances
from hiplora.recipes.protocols import MergeFail
from hiplora.reporting.study.paper import paper_value
from hiplora.reporting.study.spec import Figure, Grid, Measurement, Plot, Section, Series, Table
from hiplora.study.builder import Study
from hiplora.study.engine.jobs import Job
from hiplora.study.protocols.drifts import drift_measurements, drift_table, drifts
from hiplora.study.protocols.merges import Judged, MergeScores, merge_of, needed, rule_title
from hiplora.study.protocols.show import cell, difference, form_told, marked, measurement, smallest_told
from hiplora.study.results import FORMS, Results
from hiplora.study.statistics import Resampler, by_seed, estimate, hierarchical

NAME, TITLE = "merge-fail", "Merges that fail"


def jobs(study: Study, settings: MergeFail) -> list[Job]:
    """Merge the drawn tuples of every method by every rule; score each on its own tasks, and its adapters."""
    return [
        job
        for method in settings.methods
        for rule in settings.rules
        for job in needed(study, study.row(method), _merges(study, settings, method, rule))
    ]


def section(study: Study, settings: MergeFail, results: Results) -> Section:
    """Tables of MergeFail over sizes and thresholds in both forms, differences between methods, and drift."""
    tables: list[Table] = []
    measurements: list[Measurement] = []
    texts: list[str] = []
    figures: list[Figure] = []
    for form in FORMS:
        judged = _judged(study, settings, results, form)
        tables += [_sizes_table(study, settings, judged, form), _taus_table(settings, judged, form)]
        measurements += _measurements(study, settings, judged, form)
        texts += _texts(study, settings, judged, form)
        if judged and form == "likelihood":
            figures.append(_figure(settings, judged))
    if settings.drift:
        more, rows = _drifts(study, settings, results)
        tables += more
        measurements += rows
    return Section(NAME, TITLE, texts, tables, figures, measurements, list(results.missing))


def _instances(study: Study, settings: MergeFail) -> list[MergeInstance]:
    """The drawn merges, equally many for each seed, seed after seed; two seeds may draw the same."""
    domains, seeds = list(study.recipe.domains), study.seeds(settings)
    return [
        instance
        for seed in seeds
        for found in merge_instances(
            domains, settings.sizes, seeds, settings.instances, settings.seed + seed
        ).values()
        for instance in found
    ]


def different_merges(study: Study, settings: MergeFail) -> Counter[int]:
    """Size → how many different merges were drawn."""
    return Counter(len(instance) for instance in set(_instances(study, settings)))


def _merges(study: Study, settings: MergeFail, method: str, rule: str) -> dict[MergeInstance, Job]:
    row, options = study.row(method), settings.rules[rule]
    return {
        instance: merge_of(study, row, instance, rule, options, settings.drift)
        for instance in _instances(study, settings)
    }


def _taus(settings: MergeFail) -> list[float]:
    return sorted({*settings.taus, settings.tau})


def _judged(study: Study, settings: MergeFail, results: Results, form: str) -> list[Judged]:
    """The verdicts by rule, then method, of those all of whose merges are there; a merge for each time it was drawn."""
    draws, found, drawn = Resampler(), [], _instances(study, settings)
    places = {instance: place for place, instance in enumerate(dict.fromkeys(drawn))}
    which = [places[instance] for instance in drawn]
    for method in settings.methods:
        scores = MergeScores(study, results, form, draws)
        for rule in settings.rules:
            merges = _merges(study, settings, method, rule)
            found.append(scores.judged(study.row(method), merges, rule, _taus(settings)))
    known = [replace(one, failed=one.failed[:, which]) for one in found if one is not None]
    return [one for rule in settings.rules for one in known if one.rule == rule]


def _sizes(study: Study, settings: MergeFail) -> dict[int | None, list[int]]:
    """Size → places of its merges; all of them under None."""
    lengths = [len(instance) for instance in _instances(study, settings)]
    found: dict[int | None, list[int]] = {
        size: [place for place, length in enumerate(lengths) if length == size]
        for size in dict.fromkeys(lengths)
    }
    return {**found, None: list(range(len(lengths)))}


def _sizes_table(study: Study, settings: MergeFail, judged: Sequence[Judged], form: str) -> Table:
    sizes, tau = _sizes(study, settings), _taus(settings).index(settings.tau)
    different = different_merges(study, settings)
    lines = []
    for one in judged:
        cells = [cell(estimate(one.share(tau, which))) for size, which in sizes.items() if size is not None]
        paper = paper_value("merge-rules", one.name, "MergeFail") if form == "accuracy" else None
        lines.append((one.name, [*cells, cell(estimate(one.share(tau)), paper)]))
    columns = ["Merged", *(f"{n} adapters ({different[n]})" for n in sizes if n), "All"]
    note = (
        "Per cent of the merges that were drawn (in brackets: how many different ones) in which some task keeps less "
        f"than τ = {settings.tau:g} of the score of its adapter alone. {form_told(form)}. Brackets: 95 % intervals "
        "over items; the paper's, over merges, stand among the measurements. A task whose score alone is 0 cannot fail."
        " Where none of n merges failed, a share up to 3/n is compatible with that."
    )
    best = dict.fromkeys(range(len(sizes)), "low")
    return Table(f"{NAME}-{form}", f"MergeFail: {form}", columns, marked(lines, best), note)


def _taus_table(settings: MergeFail, judged: Sequence[Judged], form: str) -> Table:
    taus = _taus(settings)
    lines = [(one.name, [cell(estimate(one.share(place))) for place in range(len(taus))]) for one in judged]
    note = "MergeFail in per cent over all merges at each threshold τ; brackets: 95 % intervals over items."
    columns = ["Merged", *(f"τ = {tau:g}" for tau in taus)]
    rows = marked(lines, dict.fromkeys(range(len(taus)), "low"))
    return Table(f"{NAME}-thresholds-{form}", f"MergeFail over the threshold: {form}", columns, rows, note)


def _measurements(
    study: Study, settings: MergeFail, judged: Sequence[Judged], form: str
) -> Iterator[Measurement]:
    """MergeFail and its differences, at the threshold that is reported first before the others."""
    sizes, taus, seeds = _sizes(study, settings), _taus(settings), len(study.seeds(settings))
    different = different_merges(study, settings)
    first = {one.rule: one for one in reversed(judged)}
    for one in judged:
        for place, tau in sorted(enumerate(taus), key=lambda found: found[1] != settings.tau):
            wide = hierarchical({one.title: by_seed(one.verdicts(place), seeds).tolist()})[one.title]
            for size, which in sizes.items():
                merges = different.total() if size is None else different[size]
                setting = {"rule": one.rule, "tau": tau, "size": size or "all", "merges": merges}
                yield measurement(
                    NAME, one.title, "merge fail", estimate(one.share(place, which)), one.jobs, form=form, unit="%",
                    setting=setting, seeds=seeds, wide=wide if size is None else None,
                )  # fmt: skip
            against = first[one.rule]
            if one is not against:
                setting = {"rule": one.rule, "tau": tau, "merges": different.total()}
                setting |= _paired_over_merges(one, against, place, seeds)
                here, there = ((x.title, x.share(place), x.jobs) for x in (one, against))
                yield difference(NAME, "merge fail", here, there, form=form, setting=setting, seeds=seeds)


def _paired_over_merges(one: Judged, other: Judged, tau: int, seeds: int) -> dict[str, float | None]:
    """The paper's interval of a difference: seeds are drawn, then the merges that were drawn for each."""
    apart = [a - b for a, b in zip(one.verdicts(tau), other.verdicts(tau), strict=True)]
    found = hierarchical({one.title: by_seed(apart, seeds).tolist()})[one.title]
    return {"hierarchical_low": found.low, "hierarchical_high": found.high}


def _texts(study: Study, settings: MergeFail, judged: Sequence[Judged], form: str) -> Iterator[str]:
    tau = _taus(settings).index(settings.tau)
    count, drawn = different_merges(study, settings).total(), len(_instances(study, settings))
    those = f"{count} merges" if count == drawn else f"{drawn} drawn merges ({count} different ones)"
    for rule in settings.rules:
        found = [one for one in judged if one.rule == rule]
        if not found:
            continue
        shares = ", ".join(f"{one.share(tau)[0]:.1f} % of {one.title}" for one in found)
        told = smallest_told([one.share(tau) for one in found])
        yield (
            f"By {form}, of {those} by {rule_title(rule)} these fail at τ = {settings.tau:g}: {shares}. {told}"
        ).strip()


def _figure(settings: MergeFail, judged: Sequence[Judged]) -> Figure:
    taus = _taus(settings)
    plots = []
    for rule in dict.fromkeys(one.rule for one in judged):
        series = []
        for one in (one for one in judged if one.rule == rule):
            found = [estimate(one.share(place)) for place in range(len(taus))]
            lows, highs = [x.low or 0.0 for x in found], [x.high or 0.0 for x in found]
            series.append(Series(one.title, taus, [x.value for x in found], lows, highs))
        name, title = f"{NAME}-{rule}", f"Merged by {rule_title(rule)}"
        plots.append(Plot(name, title, "threshold τ", "MergeFail by likelihood (%)", series))
    return Grid(f"{NAME}-thresholds", "How many merges fail, over the threshold", plots)


def _drifts(study: Study, settings: MergeFail, results: Results) -> tuple[list[Table], list[Measurement]]:
    tables: list[Table] = []
    measurements: list[Measurement] = []
    drawn = _instances(study, settings)
    for rule in settings.rules:
        runs: dict[str, list[Job]] = {}
        for method in settings.methods:
            merges = _merges(study, settings, method, rule)
            runs[study.row(method).title] = [merges[instance] for instance in drawn]
        found = drifts(runs, results)
        if any(found.values()):
            title = f"Drift of the models merged by {rule_title(rule)}"
            tables.append(drift_table(found, f"{NAME}-drift-{rule}", title, "all merges"))
            seeds = len(study.seeds(settings))
            measurements += drift_measurements(found, runs, NAME, seeds, shared=True, rule=rule)
    return tables, measurements
