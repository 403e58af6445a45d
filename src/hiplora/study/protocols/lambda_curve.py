"""What the price λ of the gains buys: downstream score against Retain, as in Figure 3 of the paper."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

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
    numbers = with_jobs(scores_and_retain(study, tidy(results, runs)), runs)
    numbers = numbers[numbers.method != BASE]
    prices = {_priced(study, settings, price).title: price for price in settings.values}
    numbers = numbers.assign(**{"lambda": numbers.method.map(prices)})
    found = Findings(settings.name, settings.title)
    title = study.row(settings.method).title
    low, high = min(settings.values), max(settings.values)
    change = numbers[(numbers.metric == "retain difference") & (numbers["lambda"] == max(low, high))]
    change = change[change.minus.map(prices) == low] if len(change) else change
    change = change.assign(method=title, metric="retain change", **{"from": low, "to": high})
    losses = [(job.needs["adapter"], labels) for job, labels in runs if "adapter" in job.needs]
    trained = tidy(results, losses)
    loss = trained[trained.metric == "held_out_after"].groupby("method", sort=False)["value"].mean()
    found.measured = joined(numbers, change)
    for form in ("accuracy", "likelihood"):
        shown = score_columns(study, numbers[numbers.form == form], "Downstream")
        shown = shown[shown.metric.ne("score") | shown.domain.isin(_domains(study, settings))]
        wide = table(shown, "column")
        wide["Held-out loss"] = loss.reindex(wide.index).map("{:.3f}".format)
        found.tables[f"{settings.name}-{form}"] = (
            f"{title}, scores over λ: {form}, %",
            wide.rename(index=lambda row: row.rpartition(" = ")[2]).rename_axis("λ"),
        )
    figure = retain_figure(numbers.sort_values("lambda", kind="stable"), "method", title)
    if figure is not None:
        found.figures[settings.name] = "What was learned, and what it cost elsewhere, over λ", figure
    found.text = (
        "Each domain by its own adapter; Retain in pp, lower is better. The paper's curve has no numbers."
    )
    return found


def _domains(study: Study, settings: LambdaCurve) -> list[str]:
    return list(settings.domains or study.recipe.domains)


def _priced(study: Study, settings: LambdaCurve, price: float) -> Any:
    title = f"{study.row(settings.method).title}, λ = {price:g}"
    return study.variant(settings.method, title, stability_weight=price)


def _runs(study: Study, settings: LambdaCurve) -> list[tuple[Job, dict]]:
    rows = [_priced(study, settings, price) for price in settings.values]
    return score_runs(
        study, rows, study.seeds(settings), _domains(study, settings), study.row(settings.method)
    )
