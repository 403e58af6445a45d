"""Rank-1 interventions on the base: what single directions are worth, and how that goes with σ (Tables 3 and 6)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hiplora.probing import contrasts, findings
from hiplora.recipes.protocols import RankOne
from hiplora.reporting.numbers import signed
from hiplora.reporting.study.paper import paper_value
from hiplora.reporting.study.spec import Cell, Grid, Measurement, Plot, Section, Series, Table
from hiplora.study.builder import Study
from hiplora.study.engine.jobs import Job
from hiplora.study.protocols.show import measurement
from hiplora.study.results import Results
from hiplora.study.statistics import Estimate

NAME, TITLE = "rank-one", "Rank-1 interventions"
METRICS = {"kl": "KL from the base", "log_perplexity": "log of the perplexity's ratio"}  # nats a token
COEFFICIENTS = ("pearson", "spearman")
ALL = "all"  # the type that stands for all modules


def jobs(study: Study, settings: RankOne) -> list[Job]:
    """Probe the base in each basis."""
    return [_probe(study, settings, basis) for basis in settings.bases]


def section(study: Study, settings: RankOne, results: Results) -> Section:
    """Correlations of the loss with σ for every intervention, and the losses over σ."""
    tables: list[Table] = []
    figures = []
    measurements: list[Measurement] = []
    texts: list[str] = []
    for basis in settings.bases:
        job = _probe(study, settings, basis)
        found = results.get(job)
        if found is None:
            continue
        tables += [_table(found["correlations"], metric, basis) for metric in METRICS]
        figures.append(_scatter(found["records"], settings, basis))
        measurements += _measurements(found["correlations"], basis, job)
        records = found["records"]
        apart, without = _apart(records, basis, job), _without_strongest(records, basis, job)
        measurements += [*apart, *without]
        texts += [
            *_texts(found["correlations"], basis),
            *_texts_without(without, basis),
            *_texts_apart(apart, basis),
        ]
    return Section(NAME, TITLE, texts, tables, figures, measurements, list(results.missing))


def _probe(study: Study, settings: RankOne, basis: str) -> Job:
    evaluation = study.recipe.evaluation.drift
    texts = dict(evaluation.texts) if evaluation is not None else {}
    asked = {
        "modules": settings.modules,
        "layers": settings.layers,
        "directions": settings.directions,
        "choice": settings.choice,
        "basis": basis,
        "kinds": settings.kinds,
        "draws": settings.draws,
        "tokens": settings.tokens,
        "texts": texts,
        "seed": study.recipe.evaluation.seed,
        "files": study.hashes([source.partition(":")[0] for source in texts.values()]),
    }
    return study.job("probe", f"probe the base, {basis} basis", asked)


def _named(kind: str) -> str:
    """An intervention as the paper names it: Zero, Flip, Noise 0.1."""
    return kind.replace("_", " ").capitalize()


def _overall(correlations: Sequence[Mapping[str, Any]], metric: str) -> list[Mapping[str, Any]]:
    return [one for one in correlations if one["metric"] == metric and one["type"] == ALL]


def _table(correlations: Sequence[Mapping[str, Any]], metric: str, basis: str) -> Table:
    columns = ["Intervention", "Directions", "Pearson", "Pearson p", "Spearman", "Spearman p"]
    rows = []
    for one in _overall(correlations, metric):
        name = _named(one["kind"])
        of_paper = basis == "weight" and metric == "log_perplexity"
        papers = {
            column: paper_value("rank-one", name, column) if of_paper else None for column in columns[1:]
        }
        cells = [Cell(one["points"], paper=papers["Directions"], digits=0)]
        for coefficient in COEFFICIENTS:
            found, column = one[coefficient], coefficient.capitalize()
            cells.append(Cell(found["estimate"], found["low"], found["high"], paper=papers[column], digits=2))
            cells.append(Cell(found["p_value"], paper=papers[f"{column} p"], digits=4))
        rows.append((name, cells))
    note = f"{METRICS[metric]}, in nats a token, against σ of the direction, {basis} basis; 95 % bootstrap intervals."
    return Table(
        f"{NAME}-{basis}-{metric.replace('_', '-')}",
        f"Correlation with σ, {basis} basis: {METRICS[metric]}",
        columns,
        rows,
        note,
    )


def _texts(correlations: Sequence[Mapping[str, Any]], basis: str) -> Iterator[str]:
    """Pearson's correlations of KL with σ, which of them are told from none, and what could have been."""
    known = [one for one in _overall(correlations, "kl") if one["pearson"]["estimate"] is not None]
    if not known:
        return
    told = ", ".join(f"{_named(one['kind'])} {one['pearson']['estimate']:.2f}" for one in known)
    bounds = [(one, one["pearson"]["low"], one["pearson"]["high"]) for one in known]
    with_interval = [(one, low, high) for one, low, high in bounds if low is not None and high is not None]
    text = f"{basis.capitalize()} basis, Pearson's correlation of KL with σ: {told}."
    if with_interval:
        apart = [_named(one["kind"]) for one, low, high in with_interval if low > 0 or high < 0]
        least = float(np.median([(high - low) / 2 for _, low, high in with_interval]))
        text += (
            f" Told from none: {', '.join(apart) or 'no intervention'}; a correlation can be if it is larger than "
            f"about {least:.2f} (median half width of the 95 % intervals)."
        )
    yield text


def _measurements(correlations: Sequence[Mapping[str, Any]], basis: str, job: Job) -> Iterator[Measurement]:
    for one in correlations:
        for coefficient in COEFFICIENTS:
            found = one[coefficient]
            if found["estimate"] is None:
                continue
            setting = {"metric": one["metric"], "basis": basis, "type": one["type"], "p": found["p_value"]}
            value = Estimate(found["estimate"], found["low"], found["high"])
            yield measurement(
                NAME, _named(one["kind"]), coefficient, value, [job], items=one["points"], setting=setting
            )


def _without_strongest(records: Sequence[Mapping[str, Any]], basis: str, job: Job) -> list[Measurement]:
    """Pearson's correlations over all directions but that of the largest σ, which may make them alone."""
    strongest = max(records, key=lambda record: record["sigma"])
    left = [  # as of one type: no type is looked at alone
        {**one, "type": ALL}
        for one in records
        if (one["module"], one["index"]) != (strongest["module"], strongest["index"])
    ]
    found = []
    for one in findings(left):
        pearson = one["pearson"]
        if pearson["estimate"] is None:
            continue
        told = {
            "metric": one["metric"],
            "basis": basis,
            "without": f"{strongest['module']}, σ = {strongest['sigma']:.1f}",
        }
        value, points = Estimate(pearson["estimate"], pearson["low"], pearson["high"]), one["points"]
        name = "pearson without the strongest"
        found.append(measurement(NAME, _named(one["kind"]), name, value, [job], items=points, setting=told))
    return found


def _texts_without(without: Sequence[Measurement], basis: str) -> Iterator[str]:
    """What is left of the correlations of the lost performance with σ without the strongest direction."""
    told = [
        f"{one.method} {signed(one.value)} [{signed(one.low)}, {signed(one.high)}]"
        for one in without
        if one.setting["metric"] == "log_perplexity" and one.low is not None
    ]
    if told:
        yield (
            f"{basis.capitalize()} basis, without its strongest direction ({without[0].setting['without']}): Pearson's "
            f"correlation of the perplexity's log with σ is {', '.join(told)}."
        )


def _apart(records: Sequence[Mapping[str, Any]], basis: str, job: Job) -> list[Measurement]:
    """How far apart the correlations of each two interventions are, over the same directions."""
    found = []
    for one in contrasts(records):
        for coefficient in COEFFICIENTS:
            apart = one[coefficient]
            if apart["estimate"] is None:
                continue
            setting = {"minus": _named(one["minus"]), "metric": one["metric"], "basis": basis}
            value = Estimate(apart["estimate"], apart["low"], apart["high"])
            name = f"{coefficient} difference"
            found.append(
                measurement(
                    NAME, _named(one["kind"]), name, value, [job], items=one["points"], setting=setting
                )
            )
    return found


def _texts_apart(apart: Sequence[Measurement], basis: str) -> Iterator[str]:
    """Differences of Pearson's correlation of the lost performance with σ, as of the paper's own ordering."""
    told = [
        f"{one.method} over {one.setting['minus']} {signed(one.value)} [{signed(one.low)}, {signed(one.high)}]"
        for one in apart
        if one.metric == "pearson difference" and one.setting["metric"] == "log_perplexity"
        if one.low is not None and one.high is not None
    ]
    if told:
        yield (
            f"{basis.capitalize()} basis, how far apart Pearson's correlations of the perplexity's log with σ are, "
            f"over the same directions: {', '.join(told)}."
        )


def _scatter(records: Sequence[Mapping[str, Any]], settings: RankOne, basis: str) -> Grid:
    """KL over σ, a plot an intervention, a series a module type; what has no logarithm is counted in the note."""
    plots, left_out = [], 0
    for kind in settings.kinds:
        points: dict[str, list[tuple[float, float]]] = {}
        for record in (record for record in records if record["kind"] == kind):
            kl = record["drop"]["kl"]
            if kl is None or kl <= 0 or record["sigma"] <= 0:
                left_out += 1
                continue
            module = str(record["module"]).rpartition(".")[2]
            points.setdefault(module, []).append((record["sigma"], kl))
        series = [Series(name, [x for x, _ in some], [y for _, y in some]) for name, some in points.items()]
        name = f"{NAME}-{basis}-{kind.replace('_', '-')}"
        plots.append(
            Plot(name, _named(kind), "σ", "KL (nats a token)", series, "points", x_log=True, y_log=True)
        )
    note = "A dot is one direction of one module, changed alone."
    if left_out:
        note += f" Not drawn, for a KL or σ that is not above 0: {left_out}."
    return Grid(f"{NAME}-{basis}", f"What single directions are worth, {basis} basis", plots, note)
