"""Where the updates lie on the spectrum of the base weights: gains against σ, and energy inside the principal part."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hiplora.recipes.protocols import Allocation
from hiplora.reporting._old_plots.spectrum import TYPE_ORDER
from hiplora.reporting.study.spec import Cell, Figure, Grid, Measurement, Plot, Section, Series, Table
from hiplora.study.builder import Study
from hiplora.study.engine.jobs import Job
from hiplora.study.protocols.show import cell, measurement
from hiplora.study.results import Results
from hiplora.study.statistics import Estimate, hierarchical

NAME, TITLE = "allocation", "Where the updates lie"
ALL = "all"
Found = Mapping[str, Sequence[Mapping[str, Any]]]  # title → what was found of its adapters, one a domain


def jobs(study: Study, settings: Allocation) -> list[Job]:
    """Look at the adapters of every method and domain, of the first seed."""
    return [job for method in settings.methods for job in _inspections(study, settings, method)]


def section(study: Study, settings: Allocation, results: Results) -> Section:
    """Tables of the energy inside and of how gains follow σ; the gains over σ and over its rank, by module type."""
    found: dict[str, list[dict[str, Any]]] = {}
    used: dict[str, list[Job]] = {}
    for method in settings.methods:
        title, asked = study.row(method).title, _inspections(study, settings, method)
        done = [one for job in asked if (one := results.get(job)) is not None]
        if len(done) == len(asked):
            found[title], used[title] = done, asked
    gains = {
        title: found[title]
        for method in settings.methods
        if (title := study.row(method).title) in found
        and getattr(study.row(method).method, "principal_channel", False)
    }
    measurements = [*_energy_measurements(settings, found, used), *_gain_measurements(settings, gains, used)]
    tables = [_energy_table(settings, found)]
    figures: list[Figure] = []
    if gains:
        tables.append(_gains_table(gains))
        figures = [_grid(gains, over_rank=False), _grid(gains, over_rank=True)]
    texts = [_told(settings, found)] if found else []
    return Section(NAME, TITLE, texts, tables, figures, measurements, list(results.missing))


def _inspections(study: Study, settings: Allocation, method: str) -> list[Job]:
    row, seed = study.row(method), study.seeds(settings)[0]
    domains = settings.domains or list(study.recipe.domains)
    return [study.inspect(study.adapter(row, domain, seed), settings.rank) for domain in domains]


def _types(found: Found) -> list[str]:
    """The types of the modules, known ones in the order of a layer."""
    types = dict.fromkeys(row["type"] for some in found.values() for one in some for row in one["modules"])
    return [kind for kind in TYPE_ORDER if kind in types] + [kind for kind in types if kind not in TYPE_ORDER]


def _modules(found: Sequence[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    """The modules of a type, or all."""
    return [row for one in found for row in one["modules"] if kind in (row["type"], ALL)]


def _inside(found: Sequence[Mapping[str, Any]], kind: str) -> float | None:
    """The mean over domains of the share of the energy inside in per cent, None where no such module is adapted."""
    shares = [one["energy_inside"][kind] for one in found if kind in one["energy_inside"]]
    return 100 * float(np.mean(shares)) if shares else None


def _energy_table(settings: Allocation, found: Found) -> Table:
    types = _types(found)
    lines = []
    for title, some in found.items():
        shares = [_inside(some, kind) for kind in (*types, ALL)]
        lines.append((title, [Cell(share, digits=2) for share in shares]))
    note = (
        f"Share of the update's energy ‖ΔW‖² that reads and writes the {settings.rank} leading singular directions of "
        "the base weight, in per cent: the mean over domains, first seed. An update that knows nothing of the spectrum "
        "has about (k / m)(k / n) there. A dash: the method does not adapt such modules."
    )
    columns = ["Method", *types, "All modules"]
    return Table(f"{NAME}-energy", "Energy inside the principal subspaces", columns, lines, note)


def _energy_measurements(
    settings: Allocation, found: Found, used: Mapping[str, Sequence[Job]]
) -> Iterator[Measurement]:
    for title, some in found.items():
        for kind in (*_types({title: some}), ALL):
            share = _inside(some, kind)
            if share is not None:
                setting = {"type": kind, "rank": settings.rank}
                yield measurement(
                    NAME, title, "energy inside", Estimate(share), used[title], unit="%", setting=setting
                )


def _follows(found: Sequence[Mapping[str, Any]], kind: str) -> Estimate | None:
    """The mean over modules and domains of Spearman's correlation of |δ| with σ, its interval over these; None where it
    has no meaning.
    """
    from scipy.stats import spearmanr

    values = []
    for row in _modules(found, kind):
        sizes = np.abs(row["gains"])
        if len(set(sizes)) > 1 and len(set(row["sigma"])) > 1:
            values.append(float(spearmanr(sizes, row["sigma"]).statistic))
    return hierarchical({kind: [values]})[kind] if values else None


def _relative(found: Sequence[Mapping[str, Any]], kind: str) -> Estimate | None:
    """The median of |δ| / σ in per cent."""
    shares = [
        abs(gain) / sigma
        for row in _modules(found, kind)
        for gain, sigma in zip(row["gains"], row["sigma"], strict=True)
        if sigma > 0
    ]
    return Estimate(100 * float(np.median(shares))) if shares else None


def _gains_table(gains: Found) -> Table:
    types, lines = [*_types(gains), ALL], []
    for title, some in gains.items():
        follows = [_follows(some, kind) for kind in types]
        relative = [_relative(some, kind) for kind in types]
        lines.append((f"{title}, correlation", [cell(found, digits=2) for found in follows]))
        lines.append((f"{title}, median |δ| / σ in %", [cell(found, digits=3) for found in relative]))
    note = (
        "Correlation: Spearman's, of |δ| with σ among the directions of a module, mean over modules and domains. Above "
        "0, strong directions move more; below it, less, as a price that grows with σ makes them. Brackets: 95 % "
        "intervals over modules and domains."
    )
    return Table(
        f"{NAME}-gains", "How gains follow the spectrum", ["Method", *types[:-1], "All modules"], lines, note
    )


def _gain_measurements(
    settings: Allocation, gains: Found, used: Mapping[str, Sequence[Job]]
) -> Iterator[Measurement]:
    for title, some in gains.items():
        for kind in (ALL, *_types({title: some})):
            for metric, value, unit in (
                ("gain correlation", _follows(some, kind), ""),
                ("median relative gain", _relative(some, kind), "%"),
            ):
                if value is not None:
                    setting = {"type": kind, "rank": settings.rank}
                    yield measurement(NAME, title, metric, value, used[title], unit=unit, setting=setting)


def _grid(gains: Found, over_rank: bool) -> Grid:
    """|δ| of every direction, one plot a module type: over σ, or over the direction's place by σ."""
    plots = []
    for kind in _types(gains):
        series = []
        for title, some in gains.items():
            points = [
                (place if over_rank else sigma, abs(gain))
                for row in _modules(some, kind)
                for place, (sigma, gain) in enumerate(zip(row["sigma"], row["gains"], strict=True), 1)
            ]
            series.append(Series(title, [float(x) for x, _ in points], [y for _, y in points]))
        label = "direction, by σ" if over_rank else "σ of the base weight"
        name = f"{NAME}-{kind.replace('_', '-').lower()}"
        plots.append(Plot(name, kind, label, "|δ|", series, "points", x_log=not over_rank, y_log=True))
    what = "place" if over_rank else "strength"
    note = "A dot is a protected direction of one module after training on one domain; first seed."
    name = f"{NAME}-{'rank' if over_rank else 'sigma'}"
    return Grid(name, f"How far each gain moved, by the {what} of its direction", plots, note)


def _told(settings: Allocation, found: Found) -> str:
    shares = ", ".join(
        f"{share:.2f} % with {title}"
        for title, some in found.items()
        if (share := _inside(some, ALL)) is not None
    )
    return (
        f"Of the update's energy, this much reads and writes the {settings.rank} leading directions of the base "
        f"weights: {shares}."
    )
