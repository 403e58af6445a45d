"""Where the updates lie on the spectrum of the base weights: gains against σ, and energy inside the principal part."""

import numpy as np
import pandas as pd
from pydantic import Field

from hiplora.reporting import plots
from hiplora.study.protocols.settings import Done, Findings, OfMethods, Positive, Run, Study
from hiplora.study.records import joined, measured, table
from hiplora.study.statistics import hierarchical

ALL = "all"
BY = ["method", "type"]


class Allocation(OfMethods):
    """Where the updates lie on the spectrum of the base weights."""

    rank: Positive = Field(default=32, description="Leading directions that count as principal.")
    domains: list[str] | None = Field(default=None, description="Domains of the adapters; all, if empty.")

    def runs(self, study: Study) -> list[Run]:
        """Look at the adapters of every method and domain, of the first seed."""
        runs: list[Run] = []
        for row in map(study.row, self.methods):
            label = {"method": row.title, "has_gains": getattr(row.method, "principal_channel", False)}
            for domain in self.domains or study.recipe.domains:
                job = study.inspect(study.adapter(row, domain, study.seeds(self)[0]), self.rank)
                runs.append((job, {**label, "domain": domain}))
        return runs

    def tables(self, study: Study, done: Done) -> Findings:
        """Return the energy inside and how gains follow σ; the gains over σ, by module type."""
        results = [(record["result"], labels) for _, record, labels in done]
        modules = pd.concat(pd.DataFrame(result["modules"]).assign(**labels) for result, labels in results)
        energy = pd.concat(
            pd.Series(result["energy_inside"], name="value").rename_axis("type").reset_index().assign(**labels)
            for result, labels in results
        )
        means = 100 * energy.groupby(BY, sort=False)["value"].mean().rename("estimate")
        inside = measured(means, "energy inside", "%", low=np.nan, high=np.nan)
        with_gains = modules[modules.has_gains]
        with_gains = pd.concat([with_gains.assign(type=ALL), with_gains])
        gains = joined(_gain_correlations(with_gains), relative_gains(with_gains))
        caption = "Energy inside the principal subspaces, %"
        findings = Findings(joined(inside, gains).assign(rank=self.rank))
        findings.tables["energy"] = caption, _table(inside, 2)
        if len(gains):
            shown = gains.assign(method=gains.method + ", " + gains.metric)
            findings.tables["gains"] = "How gains follow the spectrum", _table(shown, 3)
        points = _directions(with_gains[with_gains.type != ALL])
        if (points.gain > 0).any():
            figure = plots.facets(
                points[points.gain > 0], "type", plots.scatter, x="sigma", y="gain", group="method",
                logx=True, logy=True, xlabel="σ of the base weight", ylabel="|δ|",
            )  # fmt: skip
            findings.figures["sigma"] = "How far each gain moved, over σ; first seed", figure
        findings.text = (
            f"Energy: share of ‖ΔW‖² that reads and writes the {self.rank} leading singular directions of the base "
            "weight, mean over domains, first seed. Gain correlation: Spearman's, of |δ| with σ among the directions "
            "of a module, mean over modules and domains with a 95 % interval over both. Median relative gain: median "
            "of |δ| / σ, in per cent."
        )
        return findings


def relative_gains(modules: pd.DataFrame) -> pd.DataFrame:
    """Return the median of |δ| / σ in per cent for each method and type, as measurements."""
    rows = _directions(modules)
    rows = rows[rows.sigma > 0]
    medians = rows.assign(estimate=100 * rows.gain / rows.sigma).groupby(BY, sort=False)["estimate"].median()
    return measured(medians, "median relative gain", "%", low=np.nan, high=np.nan)


def _directions(modules: pd.DataFrame) -> pd.DataFrame:
    """A row a direction: its σ and how far its gain moved."""
    rows = modules.reindex(columns=[*BY, "module", "domain", "sigma", "gains"])
    rows = rows[rows.gains.map(bool).astype(bool)].explode(["sigma", "gains"])
    return rows.assign(sigma=rows.sigma.astype(float), gain=rows.gains.astype(float).abs())


def _gain_correlations(modules: pd.DataFrame) -> pd.DataFrame:
    """The mean over modules and domains of Spearman's correlation of |δ| with σ, where neither is constant."""
    groups = _directions(modules).groupby([*BY, "module", "domain"], sort=False)[["gain", "sigma"]]
    values = {label: rows.gain.corr(rows.sigma, "spearman") for label, rows in groups if rows.nunique().min() > 1}
    if not values:
        return pd.DataFrame()
    rows = pd.Series(values).rename_axis([*BY, "module", "domain"]).rename("value").reset_index()
    return measured(hierarchical(rows.assign(seed=0), BY), "gain correlation")


def _table(numbers: pd.DataFrame, digits: int) -> pd.DataFrame:
    wide = table(numbers.assign(column=numbers.type, digits=digits))
    return wide[[*wide.columns.drop(ALL), ALL]].rename(columns={ALL: "All modules"})
