"""The method without its budget, without the projection, with zero init, without gains: Table 11 and Figure 5.

And with retraction after each step alone, the paper's implementation note, in place of gradients that are projected.
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import pandas as pd
from pydantic import Field

from hiplora.reporting import plots
from hiplora.study.protocols.allocation import relative_gains
from hiplora.study.protocols.merge_fail import Drawn, failures, labelled
from hiplora.study.protocols.merging import merge_of
from hiplora.study.protocols.settings import Findings, Protocol, Results, Run, Share, Study
from hiplora.study.protocols.single_task import score_runs, scores_and_retain, trainings, with_columns
from hiplora.study.records import BASE, FORMS, joined, measured, table, tidy
from hiplora.study.statistics import student
from hiplora.training.baselines.hiplora import OF_THE_GAINS

RULE = "addition"
SHOWN = {"merge fail": ("MergeFail", 1), "held-out loss": ("Held-out loss", 3), "leak": ("Leak", 2)}


class Ablations(Protocol):
    """The method without its budget, projection or gains, with zero init, and with retraction only."""

    name: ClassVar[str] = "ablations"
    title: ClassVar[str] = "Ablations"
    method: str = Field(description="A HiP-LoRA with gains: the full method.")
    domains: list[str] | None = Field(default=None, description="Domains to train on; all, if empty.")
    merge: bool = Field(default=True, description="Merge the adapters of the domains too, for MergeFail.")
    tau: Share = Field(default=0.9, description="Threshold of MergeFail.")

    def runs(self, study: Study) -> list[Run]:
        """Score every variant's adapters, merge those of all domains, and look where the updates lie."""
        return [run for runs in self._parts(study) for run in runs]

    def tables(self, study: Study, results: Results, runs: Sequence[Run]) -> Findings:
        """Return scores, Retain, MergeFail and losses in both forms, and the training curves."""
        scores, merges, inspections = self._parts(study)
        numbers = scores_and_retain(study, tidy(results, scores))
        numbers = numbers[numbers.method != BASE]
        trained = tidy(results, trainings(scores))
        failed = failures(study, tidy(results, merges), self._drawn(study), [self.tau]) if merges else pd.DataFrame()
        if len(failed):
            failed = failed[failed["size"] == "all"].assign(rule=RULE)
        full = study.row(self.method).title
        found = Findings(joined(numbers, failed, *_losses(trained, full), *_inspected(results, inspections)))
        for form in FORMS.values():
            shown = with_columns(study, numbers[numbers.form == form], self._domains(study), "Downstream")
            rows = found.measured[found.measured.metric.isin(SHOWN)]
            rows = rows[rows.form.isna() | (rows.form == form)]
            rows = rows.assign(column=rows.metric.map(lambda one: SHOWN[one][0]))
            rows["digits"] = rows.metric.map(lambda one: SHOWN[one][1])
            found.tables[f"{self.name}-{form}"] = (
                f"Ablations: {form}",
                table(joined(shown.assign(digits=1), rows.assign(form=form)), paper=self.name),
            )
        curves = trained[trained.metric == "loss"].dropna(subset="value")
        if not curves.empty:
            figure = plots.lines(
                curves.groupby(["method", "item"], sort=False)["value"].mean().reset_index(),
                "item", "value", "method", markers=False,
                xlabel="optimizer step", ylabel="training loss (nats a token)",
            )  # fmt: skip
            caption = "Training with and without each part, mean over domains and seeds"
            found.figures[f"{self.name}-dynamics"] = caption, figure
        found.text = (
            f"MergeFail: merges by addition, one a seed, in which a task keeps less than τ = {self.tau:g} of its "
            "score. Leak: share of the update's energy that is on one protected side only, which gains cannot cause. "
            "All variants train at the full method's learning rate. Zero init trains the gains only: with both "
            "low-rank factors at zero, the gradient of each is zero."
        )
        return found

    def variants(self, study: Study) -> list[Any]:
        """Return the full method, and it without each of its parts."""
        full = study.row(self.method)
        fields = type(full.method).model_fields
        no_gains = {name: fields[name].default for name in OF_THE_GAINS} | {"principal_channel": False}
        changes: dict[str, dict[str, Any]] = {
            "Without stability budget": {"stability_mode": "none"},
            "Without residual projection": {"residual_projection": False},
            "Zero init": {"init_weights": "zero"},
            "Without principal channel": no_gains,
        }
        if getattr(full.method, "gradient_projection", False):
            changes["Retraction only"] = {"gradient_projection": False}
        return [full, *(study.variant(self.method, title, **change) for title, change in changes.items())]

    def _domains(self, study: Study) -> list[str]:
        return list(self.domains or study.recipe.domains)

    def _drawn(self, study: Study) -> Drawn:
        """The merges: those of all domains for each seed."""
        return [(seed, tuple((domain, seed) for domain in self._domains(study))) for seed in study.seeds(self)]

    def _parts(self, study: Study) -> tuple[list[Run], list[Run], list[Run]]:
        """The scores (of the base first), the merges with what judging them reads, and the inspections.

        Inspections look at the protected directions themselves, which lead the spectrum in the weight's basis alone.
        """
        like, domains, rows = study.row(self.method), self._domains(study), self.variants(study)
        scores = score_runs(study, rows, study.seeds(self), domains, like)
        merges: list[Run] = []
        for row in rows if self.merge and len(domains) > 1 else ():
            drawn = self._drawn(study)
            made = [merge_of(study, row, instance, RULE, {}, like=like) for _, instance in drawn]
            merges += labelled(study, row, RULE, drawn, made, like)
        rank = like.method.principal_rank
        inspected = trainings(scores) if like.method.basis == "weight" and isinstance(rank, int) else []
        return scores, merges, [(study.inspect(adapter, rank), labels) for adapter, labels in inspected]


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


def _inspected(results: Results, inspections: list[Run]) -> Iterator[pd.DataFrame]:
    """The mean share of the energy that reads or writes protected directions but not both, and how far gains moved."""
    whole = results.whole(inspections, ["method"])
    parts = [pd.DataFrame(found["modules"]).assign(run=job.key, **labels) for job, found, labels in whole]
    modules = joined(*parts, columns=["method", "run", "norm", "left", "right", "both"])
    leak = (modules.left + modules.right - 2 * modules.both).clip(lower=0).to_numpy(float)
    modules = modules.assign(energy=modules.norm**2).assign(leaked=lambda one: leak * one.energy)
    energy = modules.groupby(["method", "run"], sort=False)[["leaked", "energy"]].sum()
    shares = (energy.leaked / energy.energy.where(energy.energy > 0, 1.0)).groupby(level="method", sort=False)
    yield measured(shares.mean().rename("estimate"), "leak", "fraction")
    yield relative_gains(modules.assign(type="all"))
