"""Rank-1 interventions on the base: what single directions are worth, and how that goes with σ (Tables 3 and 6)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pandas as pd
from pydantic import Field

from hiplora.reporting import plots
from hiplora.study.protocols.settings import Positive, Protocol
from hiplora.study.records import Findings, joined, paper_value, table

if TYPE_CHECKING:
    from hiplora.study.builder import Study
    from hiplora.study.jobs import Job
    from hiplora.study.store import Results

METRICS = {"kl": "KL from the base", "log_perplexity": "log of the perplexity's ratio"}  # nats a token
COEFFICIENTS = ("pearson", "spearman")
ALL = "all"  # the type that stands for all modules


class RankOne(Protocol):
    """Single directions of single weights removed, flipped or shaken."""

    name: ClassVar[str] = "rank-one"
    title: ClassVar[str] = "Rank-1 interventions"
    modules: list[str] | str | None = Field(default=None, description="Modules; the attention projections.")
    layers: list[int] | None = Field(default=None, description="Layers; first, middle and last.")
    directions: Positive = Field(default=8, description="Directions of each module.")
    choice: Literal["log", "even"] = Field(default="log", description="How chosen.")
    bases: list[Literal["weight", "activation"]] = Field(
        default=["weight"], min_length=1, description="Whose directions."
    )
    kinds: list[str] = Field(default=["zero", "flip", "noise_0.1"], min_length=1, description="Interventions.")
    draws: Positive = Field(default=1, description="Draws of the noise.")
    tokens: int = Field(default=512, ge=2, description="Tokens of each text.")


def jobs(study: Study, settings: RankOne) -> list[Job]:
    """Probe the base in each basis."""
    return [_probe(study, settings, basis) for basis in settings.bases]


def tables(study: Study, settings: RankOne, results: Results) -> Findings:
    """Return the correlations of the loss with σ for every intervention, and the losses over σ."""
    found = Findings(settings.name, settings.title)
    parts = []
    for basis, job in zip(settings.bases, jobs(study, settings), strict=True):
        probed = results.get(job)
        if probed is None:
            continue
        numbers = _numbers(probed).assign(basis=basis, jobs=job.key[:8])
        parts.append(numbers)
        for metric, title in METRICS.items():
            stem = f"{settings.name}-{basis}-{metric.replace('_', '-')}"
            caption = f"Correlation with σ, {basis} basis: {title}, nats a token"
            rows = numbers[(numbers.of == metric) & (numbers.type == ALL) & numbers.metric.isin(COEFFICIENTS)]
            found.tables[stem] = caption, _table(rows, basis == "weight" and metric == "log_perplexity")
        points = pd.DataFrame(probed["records"])
        points = points.assign(kl=points["drop"].str["kl"], module=points.module.str.rpartition(".")[2])
        points = points[(points.kl > 0) & (points.sigma > 0)].assign(intervention=points.kind.map(_named))
        if not points.empty:
            figure = plots.facets(
                points, "intervention", plots.scatter, x="sigma", y="kl", group="module", logx=True, logy=True,
                xlabel="σ", ylabel="KL (nats a token)",
            )  # fmt: skip
            caption = f"What single directions are worth, {basis} basis"
            found.figures[f"{settings.name}-{basis}"] = caption, figure
    found.measured = joined(*parts)
    found.text = "Correlations of the lost performance with a direction's σ; 95 % bootstrap intervals over directions."
    return found


def _probe(study: Study, settings: RankOne, basis: str) -> Job:
    drift = study.recipe.evaluation.drift
    texts = dict(drift.texts) if drift is not None else {}
    asked = settings.model_dump(include={"modules", "layers", "directions", "choice", "kinds", "draws", "tokens"})
    files = study.hashes([source.partition(":")[0] for source in texts.values()])
    asked |= {"basis": basis, "texts": texts, "seed": study.recipe.evaluation.seed, "files": files}
    return study.job("probe", f"probe the base, {basis} basis", asked)


def _named(kind: str) -> str:
    """An intervention as the paper names it: Zero, Flip, Noise 0.1."""
    return kind.replace("_", " ").capitalize()


def _numbers(probed: dict[str, Any]) -> pd.DataFrame:
    """The correlations, how far those of two interventions are apart, and Pearson's without the largest σ."""
    from hiplora.probing import contrasts, findings

    records = probed["records"]
    strongest = max(records, key=lambda one: one["sigma"])
    name = (strongest["module"], strongest["index"])  # this direction may make a correlation alone
    left = [{**one, "type": ALL} for one in records if (one["module"], one["index"]) != name]
    told = f"{strongest['module']}, σ = {strongest['sigma']:.1f}"
    without = _rows(findings(left), "{} without the strongest").drop(columns=["type", "p"])
    return joined(
        _rows(probed["correlations"], "{}"),
        _rows(contrasts(records), "{} difference").drop(columns=["type", "p"]),
        without[without.metric.str.startswith("pearson")].assign(without=told),
    )


def _rows(correlations: list[dict[str, Any]], metric: str) -> pd.DataFrame:
    """A row a correlation that has a value."""
    rows = [
        {
            "method": _named(one["kind"]),
            "minus": _named(one["minus"]) if "minus" in one else None,
            "metric": metric.format(name),
            "of": one["metric"],
            "type": one.get("type"),
            "items": one["points"],
            "p": one[name]["p_value"],
            **{key: one[name][key] for key in ("estimate", "low", "high")},
        }
        for one in correlations
        for name in COEFFICIENTS
        if one[name]["estimate"] is not None
    ]
    columns = ["method", "minus", "metric", "of", "type", "items", "p", "estimate", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def _table(rows: pd.DataFrame, in_paper: bool) -> pd.DataFrame:
    rows = rows.assign(column=rows.metric.str.capitalize())
    p = rows.assign(column=rows.column + " p", estimate=rows.p, low=None, high=None)
    pearson = rows[rows.metric == "pearson"]
    points = pearson.assign(column="Directions", estimate=pearson["items"], low=None, high=None)
    places = {"Directions": 0, "Pearson": 2, "Spearman": 2}
    wide = table(
        joined(points, rows, p),
        "column",
        digits=lambda row: places.get(row.column, 4),
        paper=(lambda row: paper_value("rank-one", row.method, row.column)) if in_paper else None,
    )
    order = ["Directions", "Pearson", "Pearson p", "Spearman", "Spearman p"]
    return wide[[name for name in order if name in wide]].rename_axis("Intervention")
