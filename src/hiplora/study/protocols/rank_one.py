"""Rank-1 interventions on the base: the worth of single directions, and how it goes with σ (Tables 3 and 6)."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import pandas as pd
from pydantic import Field

from hiplora.probing import contrasts, findings
from hiplora.probing.run import METRICS
from hiplora.reporting import plots
from hiplora.study.protocols.settings import Done, Findings, Positive, Protocol, Run, Study
from hiplora.study.records import joined, table

Basis = Literal["weight", "activation"]
COEFFICIENTS = ("pearson", "spearman")
DIGITS = {"Directions": 0, "Pearson": 2, "Pearson p": 4, "Spearman": 2, "Spearman p": 4}


class RankOne(Protocol):
    """Single directions of single weights removed, flipped or shaken."""

    whole: ClassVar[tuple[str, ...]] = ("basis",)
    modules: list[str] | str | None = Field(default=None, description="Modules; the attention projections.")
    layers: list[int] | None = Field(default=None, description="Layers; first, middle and last.")
    directions: Positive = Field(default=8, description="Directions of each module.")
    choice: Literal["log", "even"] = Field(default="log", description="How chosen.")
    bases: list[Basis] = Field(default=["weight"], min_length=1, description="Whose directions.")
    kinds: list[str] = Field(default=["zero", "flip", "noise_0.1"], min_length=1, description="Interventions.")
    draws: Positive = Field(default=1, description="Draws of the noise.")
    tokens: int = Field(default=512, ge=2, description="Tokens of each text.")

    def runs(self, study: Study) -> list[Run]:
        """Probe the base in each basis."""
        drift = study.recipe.evaluation.drift
        settings = self.model_dump(include={"modules", "layers", "directions", "choice", "kinds", "draws", "tokens"})
        settings |= {"texts": dict(drift.texts) if drift else {}, "seed": study.recipe.evaluation.seed}
        settings["files"] = study.hashes(drift.files if drift else ())
        return [
            (study.job("probe", f"probe the base, {basis} basis", {**settings, "basis": basis}), {"basis": basis})
            for basis in self.bases
        ]

    def tables(self, study: Study, done: Done) -> Findings:
        """Return the correlations of the loss with σ for every intervention, and the losses over σ."""
        found, parts = Findings(), []
        for _, record, labels in done:
            basis, records = labels["basis"], record["result"]["records"]
            parts.append(_numbers(records, record["result"]["correlations"]).assign(basis=basis))
            for metric, title in METRICS.items():
                name = f"{basis}-{metric.replace('_', '-')}"
                caption = f"Correlation with σ, {basis} basis: {title}, nats per token"
                in_paper = basis == "weight" and metric == "log_perplexity"
                found.tables[name] = caption, _table(parts[-1], metric, "rank-one" if in_paper else "")
            points = pd.DataFrame(records)
            points = points.assign(kl=points["drop"].str["kl"], module=points.module.str.rpartition(".")[2])
            points = points[(points.kl > 0) & (points.sigma > 0)].assign(intervention=points.kind.map(_kind_title))
            if not points.empty:
                figure = plots.facets(
                    points, "intervention", plots.scatter, x="sigma", y="kl", group="module", logx=True, logy=True,
                    xlabel="σ", ylabel="KL (nats per token)",
                )  # fmt: skip
                found.figures[basis] = f"What single directions are worth, {basis} basis", figure
        found.measured = joined(*parts)
        found.text = (
            "Correlations of the lost performance with a direction's σ; 95 % bootstrap intervals over directions."
        )
        return found


def _kind_title(kind: str) -> str:
    """An intervention as the paper names it: Zero, Flip, Noise 0.1."""
    return kind.replace("_", " ").capitalize()


def _numbers(records: list[dict[str, Any]], correlations: list[dict[str, Any]]) -> pd.DataFrame:
    """The correlations, how far those of two interventions are apart, and Pearson's without the largest σ."""
    strongest = max(records, key=lambda record: record["sigma"])  # which may make a correlation alone
    direction = (strongest["module"], strongest["index"])
    others = [{**record, "type": "all"} for record in records if (record["module"], record["index"]) != direction]
    without = _rows(findings(others), COEFFICIENTS[:1], " without the strongest").drop(columns=["type", "p"])
    return joined(
        _rows(correlations, COEFFICIENTS),
        _rows(contrasts(records), COEFFICIENTS, " difference").drop(columns=["type", "p"]),
        without.assign(without=f"{strongest['module']}, σ = {strongest['sigma']:.1f}"),
    )


def _rows(correlations: list[dict[str, Any]], coefficients: Sequence[str], suffix: str = "") -> pd.DataFrame:
    """A row a correlation that has a value."""
    rows = [
        {
            "method": _kind_title(row["kind"]),
            "minus": _kind_title(row["minus"]) if "minus" in row else None,
            "metric": name + suffix,
            "of": row["metric"],
            "type": row.get("type"),
            "items": row["points"],
            "p": row[name]["p_value"],
            **{key: row[name][key] for key in ("estimate", "low", "high")},
        }
        for row in correlations
        for name in coefficients
        if row[name]["estimate"] is not None
    ]
    columns = ["method", "minus", "metric", "of", "type", "items", "p", "estimate", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def _table(numbers: pd.DataFrame, metric: str, paper: str) -> pd.DataFrame:
    rows = numbers[(numbers.of == metric) & (numbers.type == "all") & numbers.metric.isin(COEFFICIENTS)]
    rows = rows.assign(column=rows.metric.str.capitalize())
    p = rows.assign(column=rows.column + " p", estimate=rows.p, low=None, high=None)
    points = rows[rows.metric == "pearson"]
    points = points.assign(column="Directions", estimate=points["items"], low=None, high=None)
    shown = joined(points, rows, p)
    wide = table(shown.assign(digits=shown.column.map(DIGITS)), paper=paper, order=list(DIGITS))
    return wide.rename_axis("Intervention")
