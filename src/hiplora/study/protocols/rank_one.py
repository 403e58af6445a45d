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
    kinds: list[str] = Field(
        default=["zero", "flip", "noise_0.1"], min_length=1, description="Interventions."
    )
    draws: Positive = Field(default=1, description="Draws of the noise.")
    tokens: int = Field(default=512, ge=2, description="Tokens of each text.")


def jobs(study: Study, settings: RankOne) -> list[Job]:
    """Probe the base in each basis."""
    return [_probe(study, settings, basis) for basis in settings.bases]


def tables(study: Study, settings: RankOne, results: Results) -> Findings:
    """Return the correlations of the loss with σ for every intervention, and the losses over σ."""
    found = Findings(settings.name, settings.title)
    parts = []
    for basis in settings.bases:
        job = _probe(study, settings, basis)
        probed = results.get(job)
        if probed is None:
            continue
        told = _correlations(probed["correlations"])
        numbers = joined(told, _contrasts(probed["records"]), _without_strongest(probed["records"]))
        parts.append(
            numbers.assign(basis=basis, method=numbers.kind.map(_named), jobs=job.key[:8]).drop(
                columns="kind"
            )
        )
        for metric, title in METRICS.items():
            stem = f"{settings.name}-{basis}-{metric.replace('_', '-')}"
            caption = f"Correlation with σ, {basis} basis: {title}, nats a token"
            found.tables[stem] = caption, _table(parts[-1], metric, basis)
        points = pd.DataFrame(probed["records"])
        points["kl"] = [drop["kl"] for drop in points["drop"]]
        points = points[(points.kl > 0) & (points.sigma > 0)].assign(
            module=points.module.str.rpartition(".")[2], intervention=points.kind.map(_named)
        )
        if not points.empty:
            figure = plots.facets(
                points, "intervention", plots.scatter, x="sigma", y="kl", group="module", logx=True, logy=True,
                xlabel="σ", ylabel="KL (nats a token)",
            )  # fmt: skip
            found.figures[f"{settings.name}-{basis}"] = (
                f"What single directions are worth, {basis} basis",
                figure,
            )
    found.measured = joined(*parts)
    found.text = (
        "Correlations of the lost performance with a direction's σ; 95 % bootstrap intervals over directions."
    )
    return found


def _probe(study: Study, settings: RankOne, basis: str) -> Job:
    evaluation = study.recipe.evaluation.drift
    texts = dict(evaluation.texts) if evaluation is not None else {}
    given = settings.model_dump(
        include={"modules", "layers", "directions", "choice", "kinds", "draws", "tokens"}
    )
    files = study.hashes([source.partition(":")[0] for source in texts.values()])
    asked = {**given, "basis": basis, "texts": texts, "seed": study.recipe.evaluation.seed, "files": files}
    return study.job("probe", f"probe the base, {basis} basis", asked)


def _named(kind: str) -> str:
    """An intervention as the paper names it: Zero, Flip, Noise 0.1."""
    return kind.replace("_", " ").capitalize()


def _correlations(
    correlations: list[dict[str, Any]], names: tuple[str, ...] = COEFFICIENTS, **labels: str
) -> pd.DataFrame:
    """A row a correlation that has a value."""
    rows = [
        {
            **{key: one[key] for key in ("kind", "type", "minus") if key in one},
            "of": one["metric"],
            "items": one["points"],
            "metric": name,
            "p": one[name]["p_value"],
            **{key: one[name][key] for key in ("estimate", "low", "high")},
            **labels,
        }
        for one in correlations
        for name in names
        if one[name]["estimate"] is not None
    ]
    columns = ["kind", "metric", "of", "type", "estimate", "low", "high", "items", "p"]
    return pd.DataFrame(rows, columns=None if rows else columns)


def _without_strongest(records: list[dict[str, Any]]) -> pd.DataFrame:
    """Pearson's correlations over all directions but that of the largest σ, which may make them alone."""
    from hiplora.probing import findings

    strongest = max(records, key=lambda one: one["sigma"])
    left = [
        {**one, "type": ALL}
        for one in records
        if (one["module"], one["index"]) != (strongest["module"], strongest["index"])
    ]
    told = f"{strongest['module']}, σ = {strongest['sigma']:.1f}"
    found = _correlations(findings(left), ("pearson",), without=told).drop(columns=["type", "p"])
    return found.assign(metric="pearson without the strongest")


def _contrasts(records: list[dict[str, Any]]) -> pd.DataFrame:
    """How far apart the correlations of each two interventions are, over the same directions."""
    from hiplora.probing import contrasts

    found = _correlations(contrasts(records))
    if "minus" not in found:
        return found
    return found.assign(metric=found.metric + " difference", minus=found.minus.map(_named)).drop(columns="p")


def _table(numbers: pd.DataFrame, metric: str, basis: str) -> pd.DataFrame:
    rows = numbers[(numbers.of == metric) & (numbers.type == ALL) & numbers.metric.isin(COEFFICIENTS)]
    rows = rows.assign(column=rows.metric.str.capitalize())
    p = rows.assign(column=rows.column + " p", estimate=rows.p, low=None, high=None)
    points = rows[rows.metric == "pearson"].assign(
        column="Directions", estimate=lambda one: one["items"], low=None, high=None
    )
    places = {"Directions": 0, "Pearson": 2, "Spearman": 2}
    of_paper = basis == "weight" and metric == "log_perplexity"
    wide = table(
        pd.concat([points, rows, p], ignore_index=True), "column", digits=lambda row: places.get(row.column, 4),
        paper=(lambda row: paper_value("rank-one", row.method, row.column)) if of_paper else None,
    )  # fmt: skip
    order = ["Directions", "Pearson", "Pearson p", "Spearman", "Spearman p"]
    return wide[[name for name in order if name in wide]].rename_axis("Intervention")
