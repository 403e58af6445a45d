"""Where the updates lie on the spectrum of the base weights: gains against σ, and energy inside the principal part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd
from pydantic import Field

from hiplora.reporting import plots
from hiplora.study.protocols.settings import OfMethods, Positive
from hiplora.study.records import Findings, joined, measured, table, with_jobs
from hiplora.study.statistics import hierarchical

if TYPE_CHECKING:
    from hiplora.study.builder import Study
    from hiplora.study.jobs import Job
    from hiplora.study.store import Results

ALL = "all"
BY = ["method", "type"]


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
    """Return the energy inside and how gains follow σ; the gains over σ, by module type."""
    runs = list(_runs(study, settings))
    energies, gains, lost = [], [], set()
    for job, labels in runs:
        inspected = results.get(job)
        if inspected is None:
            lost.add(labels["method"])
            continue
        inside = inspected["energy_inside"]
        energies += [{**labels, "type": kind, "value": 100 * share} for kind, share in inside.items()]
        has_gains = getattr(study.row(labels["row"]).method, "principal_channel", False)
        for one in inspected["modules"] if has_gains else ():
            columns = {name: one[name] for name in ("type", "module", "sigma")}
            gains.append(pd.DataFrame(columns).assign(gain=np.abs(one["gains"]), **labels))
    energy, moved = (
        joined(frame, columns=BY)[lambda one: ~one.method.isin(lost)]
        for frame in (pd.DataFrame(energies), joined(*gains))
    )
    found = Findings(settings.name, settings.title)
    if len(energy):
        means = energy.groupby(BY, sort=False)["value"].mean().rename("estimate")
        inside = measured(means, "energy inside", "%", low=np.nan, high=np.nan)
        followed = joined(_follows(moved), _relative(moved)) if len(moved) else pd.DataFrame()
        found.measured = with_jobs(joined(inside, followed).assign(rank=settings.rank), runs)
        caption = "Energy inside the principal subspaces, %"
        found.tables[f"{settings.name}-energy"] = caption, _table(inside, 2)
        if len(followed):
            shown = followed.assign(method=followed.method + ", " + followed.metric)
            found.tables[f"{settings.name}-gains"] = "How gains follow the spectrum", _table(shown, 3)
        if len(followed) and (moved.gain > 0).any():
            figure = plots.facets(
                moved[moved.gain > 0], "type", plots.scatter, x="sigma", y="gain", group="method",
                logx=True, logy=True, xlabel="σ of the base weight", ylabel="|δ|",
            )  # fmt: skip
            found.figures[f"{settings.name}-sigma"] = "How far each gain moved, over σ; first seed", figure
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
            yield job, {"method": row.title, "row": method, "domain": domain}


def _with_all(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of each type, and once more as of all types."""
    return pd.concat([rows.assign(type=ALL), rows], ignore_index=True)


def _follows(gains: pd.DataFrame) -> pd.DataFrame:
    """The mean over modules and domains of Spearman's correlation of |δ| with σ, where neither is constant."""
    groups = gains.groupby([*BY, "module", "domain"], sort=False)[["gain", "sigma"]]
    values = groups.apply(lambda one: one.gain.corr(one.sigma, "spearman") if one.nunique().min() > 1 else np.nan)
    values = _with_all(values.dropna().rename("value").reset_index()).assign(seed=0)
    if values.empty:
        return pd.DataFrame()
    bounds = hierarchical(values, BY).set_axis(["low", "high"], axis=1)
    means = values.groupby(BY, sort=False)["value"].mean().rename("estimate")
    return measured(bounds.join(means), "gain correlation")


def _relative(gains: pd.DataFrame) -> pd.DataFrame:
    """The median of |δ| / σ in per cent."""
    rows = _with_all(gains[gains.sigma > 0])
    medians = rows.assign(estimate=100 * rows.gain / rows.sigma).groupby(BY, sort=False)["estimate"].median()
    return measured(medians, "median relative gain", "%", low=np.nan, high=np.nan)


def _table(numbers: pd.DataFrame, digits: int) -> pd.DataFrame:
    wide = table(numbers, "type", digits=digits)
    return wide[[*wide.columns.drop(ALL), ALL]].rename(columns={ALL: "All modules"})
