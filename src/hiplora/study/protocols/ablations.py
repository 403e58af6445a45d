"""The method without its budget, without the projection, with zero init, without gains: Table 11 and Figure 5."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
from pydantic import Field

from hiplora.metrics import sign_flip_p_value
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
    scored,
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
    scores, merges, inspections = _runs(study, settings)
    return [job for job, _ in (*scores, *merges, *inspections)]


def tables(study: Study, settings: Ablations, results: Results) -> Findings:
    """Return scores, Retain, MergeFail and losses in both forms, and the training curves."""
    scores, merges, inspections = _runs(study, settings)
    records, seeds = tidy(results, scores), study.seeds(settings)
    numbers = with_jobs(scores_and_retain(study, records), scores)
    full = study.row(settings.method).title
    taken = [(seed, tuple((domain, seed) for domain in _domains(study, settings))) for seed in seeds]
    judged = tidy(results, merges)
    failed = failures(study, judged, taken, [settings.tau], shared=False) if len(judged) else pd.DataFrame()
    failed = failed[failed["size"] == "all"].assign(rule=RULE, merges=len(taken)) if len(failed) else failed
    trained = tidy(
        results, [(job.needs["adapter"], labels) for job, labels in scores if "adapter" in job.needs]
    )
    found = Findings(settings.name, settings.title)
    parts = [numbers[numbers.method != BASE], failed, _p_values(study, records, full)]
    parts += [_losses(trained), _leaks(results, inspections), _slower(trained, full)]
    found.measured = joined(*parts)
    for form in ("accuracy", "likelihood"):
        shown = score_columns(study, numbers[numbers.form == form], "Downstream")
        shown = shown[shown.metric.ne("score") | shown.domain.isin(_domains(study, settings))]
        headings = {
            "retain p": "Retain p",
            "merge fail": "MergeFail",
            "held-out loss": "Held-out loss",
            "leak": "Leak, %",
        }
        rows = found.measured[found.measured.metric.isin(headings)]
        rows = rows[rows.form.isna() | (rows.form == form)].assign(column=rows.metric.map(headings))
        rows.loc[rows.metric == "leak", "estimate"] *= 100
        shown = joined(shown[shown.method != BASE], rows)
        wide = table(shown, "column", digits=_digits, paper=lambda row, form=form: _paper(row, form, full))
        found.tables[f"{settings.name}-{form}"] = f"Ablations: {form}", wide
    curves = trained[trained.metric == "loss"].dropna(subset="value")
    if not curves.empty:
        steps = curves.groupby(["method", "item"], sort=False)["value"].mean().rename("loss").reset_index()
        caption = "Training with and without each part, mean over domains and seeds"
        labels = {"xlabel": "optimizer step", "ylabel": "training loss (nats a token)", "markers": False}
        found.figures[f"{settings.name}-dynamics"] = (
            caption,
            plots.lines(steps, "item", "loss", "method", **labels),
        )
    found.text = (
        f"MergeFail: merges by addition, one a seed, in which a task keeps less than τ = {settings.tau:g} of its "
        "score. Retain p: sign-flip test over items against the full method. Leak: share of the update's energy "
        "that is on one protected side only, which gains cannot cause. All variants train at the full method's "
        "learning rate. Zero init trains the gains only: with both low-rank factors at zero, the gradient of each "
        "is zero."
    )
    return found


def _domains(study: Study, settings: Ablations) -> list[str]:
    return list(settings.domains or study.recipe.domains)


def _runs(study: Study, settings: Ablations) -> tuple[list, list, list]:
    """The scores, the merges with what judging them reads, and the inspections, each with labels.

    Inspections look at the protected directions themselves, which lead the spectrum in the weight's basis alone.
    """
    like, seeds, domains = study.row(settings.method), study.seeds(settings), _domains(study, settings)
    rows = variants(study, settings)
    scores = score_runs(study, rows, seeds, domains, like)
    merges: list = []
    taken = [(seed, tuple((domain, seed) for domain in domains)) for seed in seeds]
    for row in rows if settings.merge and len(domains) > 1 else ():
        made = [merge_of(study, row, instance, RULE, {}, like=like) for _, instance in taken]
        merges += labelled(study, row, RULE, taken, made, like)
    rank = getattr(like.method, "principal_rank", None)
    whole = getattr(like.method, "basis", "") == "weight" and isinstance(rank, int)
    adapters = [(job.needs["adapter"], labels) for job, labels in scores if "adapter" in job.needs]
    return scores, merges, [(study.inspect(job, rank), labels) for job, labels in adapters if whole]


def _p_values(study: Study, records: pd.DataFrame, full: str) -> pd.DataFrame:
    """P-values of "neither retains more": sign flips of the items' differences, each item with its mean over seeds."""
    domains = {domain.task: name for name, domain in study.recipe.domains.items()}
    items = scored(records[records.method != BASE])  # the base's own scores cancel in the differences
    items = items[items.task.isin(domains) & (items.domain != items.task.map(domains))]
    sizes, counts = (items.groupby("task")[name].transform("nunique") for name in ("item", "domain"))
    by = {"index": ["form", "method"], "columns": ["task", "item"], "values": "value", "sort": False}
    lost = items.assign(value=-items.value / sizes * counts).pivot_table(aggfunc="mean", **by)
    lost = lost.reindex(columns=list(domains), level="task")
    rows = [
        {
            "form": form,
            "method": method,
            "minus": full,
            "estimate": sign_flip_p_value([row], [lost.loc[form, full]]),
        }
        for (form, method), row in lost.iterrows()
        if method != full and (form, full) in lost.index
    ]
    return pd.DataFrame(rows).assign(metric="retain p")


def _losses(trained: pd.DataFrame) -> pd.DataFrame:
    losses = trained[trained.metric == "held_out_after"].groupby("method", sort=False)["value"].mean()
    return measured(losses.rename("estimate"), "held-out loss", "nats/token")


def _leaks(results: Results, inspections: list) -> pd.DataFrame:
    """The mean over runs of the share of the energy that reads or writes protected directions, but not both."""
    shares: dict[str, list[float | None]] = {}
    for job, labels in inspections:
        found = results.get(job)
        share = None
        if found is not None:
            modules = pd.DataFrame(found["modules"])
            energy = modules.norm**2
            leak = (modules.left + modules.right - 2 * modules.both).clip(lower=0)
            share = float((leak * energy).sum() / energy.sum()) if energy.sum() else 0.0
        shares.setdefault(labels["method"], []).append(share)
    rows = [
        {"method": method, "estimate": float(np.mean(one))}
        for method, one in shares.items()
        if None not in one
    ]
    return pd.DataFrame(rows).assign(metric="leak", unit="fraction")


def _slower(trained: pd.DataFrame, full: str) -> pd.DataFrame:
    """Each variant's training loss, mean over the steps, minus the full method's; Student's interval over seeds."""
    losses = (
        trained[trained.metric == "loss"].groupby(["method", "domain", "seed"], sort=False)["value"].mean()
    )
    means = losses.groupby(level=["method", "seed"], sort=False).mean().unstack("seed", sort=False)
    if full not in means.index or len(means.columns) < 2:
        return pd.DataFrame()
    apart = (means - means.loc[full]).drop(index=full).stack()
    return measured(student(apart), "training loss difference", "nats/token", minus=full)


def _digits(row: Any) -> int:
    return {"retain p": 3, "held-out loss": 3, "leak": 2}.get(row.metric, 1)


def _paper(row: Any, form: str, full: str) -> float | None:
    known = form == "accuracy" and row.column in ("Downstream", "Retain", "MergeFail")
    return (
        paper_value("ablations", "HiP-LoRA" if row.method == full else row.method, row.column)
        if known
        else None
    )
