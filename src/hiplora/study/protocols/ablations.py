"""The method without its budget, without the projection, with zero init, without gains: Table 11 and Figure 5.

And with retraction after each step alone, the paper's implementation note, in place of gradients that are projected.
"""

from collections.abc import Iterator
from typing import Any

import pandas as pd
from pydantic import Field

from hiplora.metrics import DEFAULT_TAU
from hiplora.reporting import plots
from hiplora.study.protocols.allocation import relative_gains
from hiplora.study.protocols.merge_fail import failures
from hiplora.study.protocols.merging import Drawn, merge_runs, of_all
from hiplora.study.protocols.settings import Done, Findings, Protocol, Run, Share, Study
from hiplora.study.protocols.single_task import score_runs, scores_and_retain, trainings, with_columns
from hiplora.study.records import BASE, FORMS, joined, measured, table, tidy
from hiplora.study.statistics import student
from hiplora.training.baselines.hiplora import OF_THE_GAINS

RULE = "addition"
SHOWN = {"merge fail": ("MergeFail", 1), "held-out loss": ("Held-out loss", 3), "leak": ("Leak", 2)}


class Ablations(Protocol):
    """The method without its budget, projection or gains, with zero init, and with retraction only."""

    method: str = Field(description="A HiP-LoRA with gains: the full method.")
    domains: list[str] | None = Field(default=None, description="Domains to train on; all, if empty.")
    merge: bool = Field(default=True, description="Merge the adapters of the domains too, for MergeFail.")
    tau: Share = Field(default=DEFAULT_TAU, description="Threshold of MergeFail.")

    def runs(self, study: Study) -> list[Run]:
        """Score every variant's adapters, merge those of all domains, and look where the updates lie.

        Inspections look at the protected directions themselves, which lead the spectrum in the weight's basis alone.
        """
        full, rows, drawn = study.row(self.method), self.variants(study), self._drawn(study)
        runs = score_runs(study, rows, study.seeds(self), self._domains(study), full)
        _, *scores = runs  # but for the base
        if self.merge and len(self._domains(study)) > 1:
            runs += merge_runs(study, {RULE: {}}, rows, drawn, like=full)
        rank = full.method.principal_rank
        if full.method.basis == "weight" and isinstance(rank, int):
            runs += [(study.inspect(score.needs["adapter"], rank), labels) for score, labels in scores]
        return runs

    def tables(self, study: Study, done: Done) -> Findings:
        """Return scores, Retain, MergeFail and losses in both forms, and the training curves."""
        inspections = [run for run in done if run[0].kind == "inspect"]
        merges = [run for run in done if "rule" in run[2]]
        scores = [run for run in done if run[0].kind == "evaluate" and "rule" not in run[2]]
        numbers, trained = scores_and_retain(study, tidy(scores)), tidy(trainings(study, scores))
        numbers = numbers[numbers.method != BASE]
        parts = [numbers]
        if merges:
            failed = failures(study, tidy(merges), self._drawn(study), [self.tau])
            parts.append(failed[failed["size"] == "all"].assign(rule=RULE))
        findings = Findings(joined(*parts, *_losses(trained, study.row(self.method).title), *_inspected(inspections)))
        looks = pd.DataFrame.from_dict(SHOWN, orient="index", columns=["column", "digits"])
        others = findings.measured[findings.measured.metric.isin(SHOWN)].join(looks, on="metric")
        for form in FORMS.values():
            shown = with_columns(study, numbers[numbers.form == form], self._domains(study), "Downstream")
            rows = others[others.form.isna() | (others.form == form)].assign(form=form)
            caption, wide = f"Ablations: {form}", table(joined(shown.assign(digits=1), rows), paper="ablations")
            findings.tables[form] = caption, wide
        curves = trained[trained.metric == "loss"].groupby(["method", "item"], sort=False)["value"].mean()
        figure = plots.lines(
            curves.dropna().reset_index(), "item", "value", "method", markers=False,
            xlabel="optimizer step", ylabel="training loss (nats per token)",
        )  # fmt: skip
        caption = "Training with and without each part, mean over domains and seeds"
        findings.figures["dynamics"] = caption, figure
        findings.text = (
            f"MergeFail: merges by addition, one a seed, in which a task keeps less than τ = {self.tau:g} of its "
            "score. Leak: share of the update's energy that is on one protected side only, which gains cannot cause. "
            "All variants train at the full method's learning rate. Zero init trains the gains only: with both "
            "low-rank factors at zero, the gradient of each is zero."
        )
        return findings

    def variants(self, study: Study) -> list[Any]:
        """Return the full method, and it without each of its parts."""
        full = study.row(self.method)
        fields = type(full.method).model_fields
        changes: dict[str, dict[str, Any]] = {
            "Without stability budget": {"stability_mode": "none"},
            "Without residual projection": {"residual_projection": False},
            "Zero init": {"init_weights": "zero"},
            "Without principal channel": {
                **{name: fields[name].default for name in OF_THE_GAINS},
                "principal_channel": False,
            },
        }
        if getattr(full.method, "gradient_projection", False):
            changes["Retraction only"] = {"gradient_projection": False}
        return [full, *(study.variant(self.method, title, **change) for title, change in changes.items())]

    def _domains(self, study: Study) -> list[str]:
        return list(self.domains or study.recipe.domains)

    def _drawn(self, study: Study) -> Drawn:
        """The merges: those of all domains for each seed."""
        return of_all(self._domains(study), study.seeds(self))


def _losses(trained: pd.DataFrame, full: str) -> Iterator[pd.DataFrame]:
    """Held-out losses; each variant's training loss, mean over the steps, minus the full method's, over the seeds."""
    losses = trained.groupby(["metric", "method", "domain", "seed"], sort=False)["value"].mean()
    losses = losses.groupby(level=["metric", "method", "seed"], sort=False).mean().unstack("metric")
    held_out = losses.held_out_after.groupby(level="method", sort=False).mean().rename("estimate")
    yield measured(held_out, "held-out loss", "nats/token")
    means = losses.loss.unstack("seed")
    if full in means.index and len(means.columns) > 1:
        differences = (means - means.loc[full]).drop(index=full).stack()
        yield measured(student(differences), "training loss difference", "nats/token", minus=full)


def _inspected(inspections: Done) -> Iterator[pd.DataFrame]:
    """The mean share of the energy that reads or writes protected directions but not both, and the gains' change."""
    if not inspections:
        return
    modules = pd.concat(
        pd.DataFrame(record["result"]["modules"]).assign(run=job.key, **labels) for job, record, labels in inspections
    )
    leak = (modules.left + modules.right - 2 * modules.both).clip(lower=0)
    modules = modules.assign(energy=modules.norm**2, leaked=leak * modules.norm**2)
    energy = modules.groupby(["method", "run"], sort=False)[["leaked", "energy"]].sum()
    shares = (energy.leaked / energy.energy.where(energy.energy > 0, 1.0)).groupby(level="method", sort=False)
    yield measured(shares.mean().rename("estimate"), "leak", "fraction")
    yield relative_gains(modules.assign(type="all"))
