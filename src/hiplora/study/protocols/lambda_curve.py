"""What the price λ of the gains buys: downstream score against Retain, as in Figure 3 of the paper."""

from typing import Any

import pandas as pd
from pydantic import Field

from hiplora.study.protocols.settings import AtLeastZero, Done, Findings, Protocol, Run, Study
from hiplora.study.protocols.single_task import retain_figure, score_runs, scores_and_retain, trainings, with_columns
from hiplora.study.records import BASE, FORMS, joined, table, tidy


class LambdaCurve(Protocol):
    """Scores against Retain over the price λ of the gains."""

    method: str = Field(description="A HiP-LoRA with gains.")
    values: list[AtLeastZero] = Field(min_length=2, description="λ.")
    domains: list[str] | None = Field(default=None, description="Domains to train on; all, if empty.")

    def runs(self, study: Study) -> list[Run]:
        """Score the base, and the adapter of every λ, domain and seed."""
        domains = self.domains or study.recipe.domains
        return score_runs(study, self._rows(study).values(), study.seeds(self), domains, study.row(self.method))

    def tables(self, study: Study, done: Done) -> Findings:
        """Return scores and Retain over λ in both forms, and the curve of the likelihoods."""
        title, low, high = study.row(self.method).title, min(self.values), max(self.values)
        prices = {row.title: price for price, row in self._rows(study).items()}
        numbers = scores_and_retain(study, tidy(done))
        numbers = numbers[numbers.method != BASE].assign(**{"lambda": lambda one: one.method.map(prices)})
        change = numbers[(numbers.metric == "retain difference") & (numbers["lambda"] == high)]
        change = change.assign(**{"from": change.minus.map(prices), "to": high})
        change = change[change["from"] == low].assign(method=title, metric="retain change")
        losses = tidy(trainings(study, done))
        loss = losses[losses.metric == "held_out_after"].groupby("method", sort=False)["value"].mean()
        findings = Findings(joined(numbers, change))
        for form in FORMS.values():
            wide = table(with_columns(study, numbers[numbers.form == form], self.domains or (), "Downstream"))
            wide["Held-out loss"] = loss.reindex(wide.index).map("{:.3f}".format)
            wide.index = pd.Index([f"{prices[row]:g}" for row in wide.index], name="λ")
            findings.tables[form] = f"{title}, scores over λ: {form}, %", wide
        figure = retain_figure(numbers, title)
        findings.figures[""] = "What was learned, and what it cost elsewhere, over λ", figure
        findings.text = (
            "Each domain by its own adapter; Retain in pp, lower is better. The paper's curve has no numbers."
        )
        return findings

    def _rows(self, study: Study) -> dict[float, Any]:
        """The method at every λ, in ascending order, in which differences are taken."""
        title = study.row(self.method).title
        return {
            price: study.variant(self.method, f"{title}, λ = {price:g}", stability_weight=price)
            for price in sorted(self.values)
        }
