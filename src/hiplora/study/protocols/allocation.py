"""Where the updates lie on the spectrum of the base weights: gains against σ, and energy inside the principal part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd
from pydantic import Field

from hiplora.reporting import plots
from hiplora.study.protocols.settings import OfMethods, Positive
from hiplora.study.records import Findings, joined, table, with_jobs
from hiplora.study.statistics import hierarchical

if TYPE_CHECKING:
    from hiplora.study.builder import Study
    from hiplora.study.jobs import Job
    from hiplora.study.store import Results

ALL = "all"


class Allocation(OfMethods):
    """Where the updates lie on the spectrum of the base weights."""

    name: ClassVar[str] = "allocation"
    title: ClassVar[str] = "Where the updates lie"
    rank: Positive = Field(default=32, description="Leading directions that count as principal.")
    domains: list[str] | None = Field(default=None, description="Domains of the adapters; all, if empty.")


def jobs(study: Study, settings: Allocation) -> list[Job]:
    """Look at the adapters of every method and domain, of the first seed."""
    return [job for job, _ in _runs(study, settings)]


def tables(study: Study, settings: Allocation, results: Results) -> Findings:
    """Return the energy inside and how gains follow σ; the gains over σ and over its rank, by module type."""
    runs = list(_runs(study, settings))
    energies, gains, lost = [], [], set()
    for job, labels in runs:
        inspected = results.get(job)
        if inspected is None:
            lost.add(labels["method"])
            continue
        for kind, share in inspected["energy_inside"].items():
            energies.append({**labels, "type": kind, "value": 100 * share})
        for one in inspected["modules"] if labels["gains"] else ():
            rank = np.arange(1, len(one["gains"]) + 1)
            columns = {
                "type": one["type"],
                "module": one["module"],
                "sigma": one["sigma"],
                "gain": np.abs(one["gains"]),
            }
            gains.append(pd.DataFrame({**columns, "place": rank}).assign(**labels))
    found = Findings(settings.name, settings.title)
    if energies:
        energy = pd.DataFrame(energies)
        energy = energy[~energy.method.isin(lost)].groupby(["method", "type"], sort=False)["value"].mean()
        parts = [
            energy.rename("estimate")
            .reset_index()
            .assign(metric="energy inside", unit="%", low=np.nan, high=np.nan)
        ]
        moved = pd.concat(gains) if gains else pd.DataFrame()
        moved = moved[~moved.method.isin(lost)] if gains else moved
        parts += [_follows(moved), _relative(moved)] if len(moved) else []
        found.measured = with_jobs(joined(*parts).assign(rank=settings.rank), runs)
        found.tables[f"{settings.name}-energy"] = (
            "Energy inside the principal subspaces, %",
            _table(parts[0], 2),
        )
        if len(moved):
            shown = joined(*parts[1:])
            shown["method"] += ", " + shown.metric
            found.tables[f"{settings.name}-gains"] = "How gains follow the spectrum", _table(shown, 3)
            found.figures = _figures(settings.name, moved)
    found.text = (
        f"Energy: share of ‖ΔW‖² that reads and writes the {settings.rank} leading singular directions of the base "
        "weight, mean over domains, first seed. Gain correlation: Spearman's, of |δ| with σ among the directions "
        "of a module, mean over modules and domains with a 95 % interval over both. Median relative gain: median "
        "of |δ| / σ, in per cent."
    )
    return found


def _runs(study: Study, settings: Allocation) -> Iterator[tuple[Job, dict]]:
    for method in settings.methods:
        row = study.row(method)
        for domain in settings.domains or study.recipe.domains:
            job = study.inspect(study.adapter(row, domain, study.seeds(settings)[0]), settings.rank)
            yield (
                job,
                {
                    "method": row.title,
                    "domain": domain,
                    "gains": bool(getattr(row.method, "principal_channel", False)),
                },
            )


def _with_all(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of each type, and once more as of all types."""
    return pd.concat([rows.assign(type=ALL), rows], ignore_index=True)


def _follows(gains: pd.DataFrame) -> pd.DataFrame:
    """The mean over modules and domains of Spearman's correlation of |δ| with σ, where neither is constant."""
    groups = gains.groupby(["method", "type", "module", "domain"], sort=False)[["gain", "sigma"]]
    values = groups.apply(
        lambda one: one.gain.corr(one.sigma, "spearman") if one.nunique().min() > 1 else np.nan
    )
    values = _with_all(values.dropna().rename("value").reset_index()).assign(seed=0)
    if values.empty:
        return pd.DataFrame()
    by = ["method", "type"]
    bounds = hierarchical(values, by).set_axis(["low", "high"], axis=1)
    means = values.groupby(by, sort=False)["value"].mean().rename("estimate")
    return bounds.join(means).reset_index().assign(metric="gain correlation", unit="")


def _relative(gains: pd.DataFrame) -> pd.DataFrame:
    """The median of |δ| / σ in per cent."""
    rows = _with_all(gains[gains.sigma > 0])
    medians = (100 * rows.gain / rows.sigma).groupby([rows["method"], rows["type"]], sort=False).median()
    return (
        medians.rename("estimate")
        .reset_index()
        .assign(metric="median relative gain", unit="%", low=np.nan, high=np.nan)
    )


def _table(numbers: pd.DataFrame, digits: int) -> pd.DataFrame:
    wide = table(numbers, "type", digits=digits)
    return wide[[*(kind for kind in wide if kind != ALL), ALL]].rename(columns={ALL: "All modules"})


def _figures(name: str, gains: pd.DataFrame) -> dict:
    """|δ| of every direction, a panel a module type: over σ, and over the direction's place by σ."""
    look = {"y": "gain", "group": "method", "ylabel": "|δ|", "logy": True}
    moved = gains[gains.gain > 0]
    if moved.empty:
        return {}
    over_sigma = plots.facets(
        moved, "type", plots.scatter, x="sigma", xlabel="σ of the base weight", logx=True, **look
    )
    over_rank = plots.facets(moved, "type", plots.scatter, x="place", xlabel="direction, by σ", **look)
    caption = "How far each gain moved, by the {} of its direction; first seed"
    return {
        f"{name}-sigma": (caption.format("strength"), over_sigma),
        f"{name}-rank": (caption.format("place"), over_rank),
    }
