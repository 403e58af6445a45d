"""The method without its budget, without the projection, with zero init, without gains: Table 11 and Figure 5."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
from pydantic import Field

from hiplora.reporting import plots
from hiplora.study.protocols.merge_fail import failures, labelled
from hiplora.study.protocols.merging import merge_of
from hiplora.study.protocols.settings import Protocol, Share
from hiplora.study.protocols.single_task import score_columns, score_runs, scores_and_retain
from hiplora.study.records import (
    BASE,
    Findings,
    joined,
    measured,
    paper_value,
    table,
    tidy,
    with_jobs,
)
from hiplora.study.statistics import student

if TYPE_CHECKING:
    from hiplora.study.builder import Study
    from hiplora.study.jobs import Job
    from hiplora.study.store import Results

RULE = "addition"


class Ablations(Protocol):
    """The method without its budget, without the projection, with zero init, without gains."""

    name: ClassVar[str] = "ablations"
    title: ClassVar[str] = "Ablations"
    method: str = Field(description="A HiP-LoRA with gains: the full method.")
    domains: list[str] | None = Field(default=None, description="Domains to train on; all, if empty.")
    merge: bool = Field(default=True, description="Merge the adapters of the domains too, for MergeFail.")
    tau: Share = Field(default=0.9, description="Threshold of MergeFail.")


def variants(study: Study, settings: Ablations) -> list[Any]:
    """Return the full method, and it without each of its parts."""
    from hiplora.training.baselines.hiplora import OF_THE_GAINS

    full = study.row(settings.method)
    fields = type(full.method).model_fields
    no_gains = {name: fields[name].default for name in OF_THE_GAINS} | {"principal_channel": False}
    changes: dict[str, dict[str, Any]] = {
        "Without stability budget": {"stability_mode": "none"},
        "Without residual projection": {"residual_projection": False},
        "Zero init": {"init_weights": "zero"},
        "Without principal channel": no_gains,
    }
    return [full, *(study.variant(settings.method, title, **change) for title, change in changes.items())]


def jobs(study: Study, settings: Ablations) -> list[Job]:
    """Score every variant's adapters, merge those of all domains, and look where the updates lie."""
    return [job for runs in _runs(study, settings) for job, _ in runs]


def tables(study: Study, settings: Ablations, results: Results) -> Findings:
    """Return scores, Retain, MergeFail and losses in both forms, and the training curves."""
    scores, merges, inspections = _runs(study, settings)
    full = study.row(settings.method).title
    numbers = with_jobs(scores_and_retain(study, tidy(results, scores)), scores)
    numbers = numbers[numbers.method != BASE]
    trained = tidy(results, [(job.needs["adapter"], labels) for job, labels in scores[1:]])
    failed, judged = pd.DataFrame(), tidy(results, merges)
    if len(judged):
        taken = _taken(study, settings)
        failed = failures(study, judged, taken, [settings.tau], shared=False)
        failed = failed[failed["size"] == "all"].assign(rule=RULE, merges=len(taken))
    parts = [numbers, failed, *_losses(trained, full), _leaks(results, inspections)]
    found = Findings(settings.name, settings.title, joined(*parts))
    headings = {"merge fail": "MergeFail", "held-out loss": "Held-out loss", "leak": "Leak, %"}
    for form in ("accuracy", "likelihood"):
        shown = score_columns(study, numbers[numbers.form == form], "Downstream")
        shown = shown[shown.metric.ne("score") | shown.domain.isin(_domains(study, settings))]
        rows = found.measured[found.measured.metric.isin(headings)]
        rows = rows[rows.form.isna() | (rows.form == form)].assign(column=rows.metric.map(headings))
        rows.loc[rows.metric == "leak", "estimate"] *= 100
        wide = table(
            joined(shown, rows),
            "column",
            digits=lambda row: {"held-out loss": 3, "leak": 2}.get(row.metric, 1),
            paper=lambda row: _paper(row, full) if row.form == "accuracy" else None,
        )
        found.tables[f"{settings.name}-{form}"] = f"Ablations: {form}", wide
    curves = trained[trained.metric == "loss"].dropna(subset="value")
    if not curves.empty:
        figure = plots.lines(
            curves.groupby(["method", "item"], sort=False)["value"].mean().reset_index(),
            "item", "value", "method", markers=False,
            xlabel="optimizer step", ylabel="training loss (nats a token)",
        )  # fmt: skip
        caption = "Training with and without each part, mean over domains and seeds"
        found.figures[f"{settings.name}-dynamics"] = caption, figure
    found.text = (
        f"MergeFail: merges by addition, one a seed, in which a task keeps less than τ = {settings.tau:g} of its "
        "score. Leak: share of the update's energy that is on one protected side only, which gains cannot cause. "
        "All variants train at the full method's learning rate. Zero init trains the gains only: with both low-rank "
        "factors at zero, the gradient of each is zero."
    )
    return found


def _domains(study: Study, settings: Ablations) -> list[str]:
    return list(settings.domains or study.recipe.domains)


def _taken(study: Study, settings: Ablations) -> list[tuple[int, tuple[tuple[str, int], ...]]]:
    """The merges: (seed, adapters), those of all domains for each seed."""
    domains = _domains(study, settings)
    return [(seed, tuple((domain, seed) for domain in domains)) for seed in study.seeds(settings)]


def _runs(study: Study, settings: Ablations) -> tuple[list, list, list]:
    """The scores (of the base first), the merges with what judging them reads, and the inspections, with labels.

    Inspections look at the protected directions themselves, which lead the spectrum in the weight's basis alone.
    """
    like, domains = study.row(settings.method), _domains(study, settings)
    rows = variants(study, settings)
    scores = score_runs(study, rows, study.seeds(settings), domains, like)
    merges: list = []
    for row in rows if settings.merge and len(domains) > 1 else ():
        taken = _taken(study, settings)
        made = [merge_of(study, row, instance, RULE, {}, like=like) for _, instance in taken]
        merges += labelled(study, row, RULE, taken, made, like)
    rank = like.method.principal_rank
    inspected = scores[1:] if like.method.basis == "weight" and isinstance(rank, int) else []
    return scores, merges, [(study.inspect(job.needs["adapter"], rank), labels) for job, labels in inspected]


def _losses(trained: pd.DataFrame, full: str) -> Iterator[pd.DataFrame]:
    """Held-out losses; each variant's training loss, mean over the steps, minus the full method's, over the seeds."""
    losses = trained.groupby(["metric", "method", "domain", "seed"], sort=False)["value"].mean()
    losses = losses.groupby(level=["metric", "method", "seed"], sort=False).mean()
    held_out = losses[losses.index.get_level_values("metric") == "held_out_after"].droplevel("metric")
    held_out = held_out.groupby(level="method", sort=False).mean().rename("estimate")
    yield measured(held_out, "held-out loss", "nats/token")
    means = losses[losses.index.get_level_values("metric") == "loss"].droplevel("metric").unstack("seed")
    if full in means.index and len(means.columns) > 1:
        apart = (means - means.loc[full]).drop(index=full).stack()
        yield measured(student(apart), "training loss difference", "nats/token", minus=full)


def _leaks(results: Results, inspections: list) -> pd.DataFrame:
    """The mean over runs of the share of the energy that reads or writes protected directions, but not both."""
    shares: dict[str, list[float]] = {}
    for job, labels in inspections:
        found, share = results.get(job), np.nan
        if found is not None:
            modules = pd.DataFrame(found["modules"])
            energy = modules.norm**2
            leak = (modules.left + modules.right - 2 * modules.both).clip(lower=0)
            share = (leak * energy).sum() / (energy.sum() or 1.0)
        shares.setdefault(labels["method"], []).append(share)
    means = pd.Series({method: np.mean(one) for method, one in shares.items()}, name="estimate", dtype=float)
    return measured(means.rename_axis("method").dropna(), "leak", "fraction")


def _paper(row: Any, full: str) -> float | None:
    if row.column not in ("Downstream", "Retain", "MergeFail"):
        return None
    return paper_value("ablations", "HiP-LoRA" if row.method == full else row.method, row.column)
