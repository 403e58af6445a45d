"""What the price λ of the gains buys: downstream score against Retain, as in Figure 3 of the paper."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd
from pydantic import Field

from hiplora.study.protocols.settings import AtLeastZero, Protocol
from hiplora.study.protocols.single_task import retain_figure, score_columns, score_runs, scores_and_retain
from hiplora.study.records import BASE, Findings, joined, table, tidy, with_jobs

if TYPE_CHECKING:
    from hiplora.study.builder import Study
    from hiplora.study.jobs import Job
    from hiplora.study.store import Results


class LambdaCurve(Protocol):
    """Scores against Retain over the price λ of the gains."""

    name: ClassVar[str] = "lambda-curve"
    title: ClassVar[str] = "Trade-off over λ"
    method: str = Field(description="A HiP-LoRA with gains.")
    values: list[AtLeastZero] = Field(min_length=2, description="λ.")
    domains: list[str] | None = Field(default=None, description="Domains to train on; all, if empty.")


def jobs(study: Study, settings: LambdaCurve) -> list[Job]:
    """Score the base, and the adapter of every λ, domain and seed."""
    return [job for job, _ in _runs(study, settings)]


def tables(study: Study, settings: LambdaCurve, results: Results) -> Findings:
    """Return scores and Retain over λ in both forms, and the curve of the likelihoods."""
    runs = _runs(study, settings)
    title, prices = (
        study.row(settings.method).title,
        {row.title: price for price, row in _rows(study, settings)},
    )
    numbers = with_jobs(scores_and_retain(study, tidy(results, runs)), runs)
    numbers = numbers[numbers.method != BASE]
    numbers = numbers.assign(**{"lambda": numbers.method.map(prices)})
    low, high = min(settings.values), max(settings.values)
    labels = {"from": numbers.get("minus", numbers.method).map(prices), "to": numbers["lambda"]}
    change = numbers.assign(**labels)[numbers.metric == "retain difference"]
    change = change[(change["from"] == low) & (change.to == high)].assign(method=title, metric="retain change")
    trained = tidy(results, [(job.needs["adapter"], labels) for job, labels in runs[1:]])
    loss = trained[trained.metric == "held_out_after"].groupby("method", sort=False)["value"].mean()
    found = Findings(settings.name, settings.title, joined(numbers, change))
    for form in ("accuracy", "likelihood"):
        shown = score_columns(study, numbers[numbers.form == form], "Downstream")
        shown = shown[shown.metric.ne("score") | shown.domain.isin(settings.domains or study.recipe.domains)]
        wide = table(shown, "column")
        wide["Held-out loss"] = loss.reindex(wide.index).map("{:.3f}".format)
        wide.index = pd.Index([f"{prices[row]:g}" for row in wide.index], name="λ")
        found.tables[f"{settings.name}-{form}"] = f"{title}, scores over λ: {form}, %", wide
    figure = retain_figure(numbers.sort_values("lambda", kind="stable"), "method", title)
    if figure is not None:
        found.figures[settings.name] = "What was learned, and what it cost elsewhere, over λ", figure
    found.text = "Each domain by its own adapter; Retain in pp, lower is better. The paper's curve has no numbers."
    return found


def _rows(study: Study, settings: LambdaCurve) -> Iterator[tuple[float, Any]]:
    """Yield λ and the method at that price."""
    for price in settings.values:
        title = f"{study.row(settings.method).title}, λ = {price:g}"
        yield price, study.variant(settings.method, title, stability_weight=price)


def _runs(study: Study, settings: LambdaCurve) -> list[tuple[Job, dict]]:
    rows = [row for _, row in _rows(study, settings)]
    domains = settings.domains or study.recipe.domains
    return score_runs(study, rows, study.seeds(settings), domains, study.row(settings.method))
