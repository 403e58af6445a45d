"""Rank-1 interventions on the base: what single directions are worth, and how that goes with σ (Tables 3 and 6)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hiplora.recipes.protocols import RankOne
from hiplora.reporting.study.paper import reported
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
    for basis in settings.bases:
        job = _probe(study, settings, basis)
        found = results.get(job)
        if found is None:
            continue
        tables += [_table(found["correlations"], metric, basis) for metric in METRICS]
        figures.append(_scatter(found["records"], settings, basis))
        measurements += _measurements(found["correlations"], basis, job)
    return Section(NAME, TITLE, (), tables, figures, measurements, list(results.missing))


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
    columns = ["Intervention", "Directions", "Pearson", "p", "Spearman", "p "]
    rows = []
    for one in _overall(correlations, metric):
        name = _named(one["kind"])
        cells = [Cell(text=f"{one['points']:,}")]
        for coefficient in COEFFICIENTS:
            found = one[coefficient]
            paper = reported("rank-one", name, coefficient) if basis == "weight" and metric == "kl" else None
            shown = None if paper is None else paper.value
            cells.append(Cell(found["estimate"], found["low"], found["high"], paper=shown, digits=2))
            cells.append(Cell(found["p_value"], digits=4))
        rows.append((name, cells))
    note = f"{METRICS[metric]}, in nats a token, against σ of the direction, {basis} basis; 95 % bootstrap intervals."
    return Table(
        f"{NAME}-{basis}-{metric.replace('_', '-')}",
        f"Correlation with σ, {basis} basis: {METRICS[metric]}",
        columns,
        rows,
        note,
    )


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


def _scatter(records: Sequence[Mapping[str, Any]], settings: RankOne, basis: str) -> Grid:
    """KL over σ, a plot an intervention, a series a module type."""
    plots = []
    for kind in settings.kinds:
        points: dict[str, list[tuple[float, float]]] = {}
        for record in records:
            kl = record["drop"]["kl"]
            if record["kind"] == kind and kl is not None and kl > 0:
                module = str(record["module"]).rpartition(".")[2]
                points.setdefault(module, []).append((record["sigma"], kl))
        series = [Series(name, [x for x, _ in some], [y for _, y in some]) for name, some in points.items()]
        slug = kind.replace("_", "-")
        plots.append(
            Plot(
                f"{NAME}-{basis}-{slug}",
                _named(kind),
                "σ",
                "KL (nats a token)",
                series,
                "points",
                x_log=True,
                y_log=True,
            )
        )
    return Grid(f"{NAME}-{basis}", f"What single directions are worth, {basis} basis", plots)
