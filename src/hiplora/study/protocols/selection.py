"""λ, γ, r and k chosen on held-out rows, one after the other: the paper's coarse-to-fine selection."""

from typing import ClassVar

import pandas as pd
from pydantic import Field

from hiplora.study.jobs import Job
from hiplora.study.protocols.settings import AtLeastZero, Done, Findings, Positive, Protocol, Run, Study


class Selection(Protocol):
    """Coarse to fine on held-out rows: λ at the given γ and k, then γ, then r if some are named, then k."""

    whole: ClassVar[tuple[str, ...]] = ("symbol",)
    method: str = Field(description="A HiP-LoRA with gains.")
    domain: str = Field(description="Domain whose held-out rows decide.")
    lambdas: list[AtLeastZero] = Field(min_length=1, description="λ to try.")
    gammas: list[AtLeastZero] = Field(min_length=1, description="γ to try.")
    residual_ranks: list[Positive] = Field(default=[], description="r to try at the same `lora_alpha`, if any.")
    ranks: list[Positive] = Field(min_length=1, description="k to try.")

    def runs(self, study: Study) -> list[Run]:
        """Choose λ, γ, r and k, each over trainings at what was chosen before."""
        method, rates = study.row(self.method), study.recipe.rates
        seeds = self.seeds or [study.recipe.seeds[0] if rates is None else rates.seed]
        chosen: dict[str, Job] = {}
        runs: list[Run] = []
        for symbol, field, values in (
            ("λ", "stability_weight", self.lambdas),
            ("γ", "stability_gamma", self.gammas),
            ("r", "r", self.residual_ranks),
            ("k", "principal_rank", self.ranks),
        ):
            suffix, candidates = "".join(f", chosen {name}" for name in chosen), {}
            for value in values:
                row = study.variant(self.method, f"{method.title}, {symbol} = {value:g}{suffix}", **{field: value})
                candidates[value] = {
                    f"{self.domain}-{value:g}-{seed}": study.adapter(
                        row, self.domain, seed, like=method, chosen=chosen
                    )
                    for seed in seeds
                }
            if candidates:
                chosen[field] = study.choice(f"{symbol} of {method.title}", candidates)
                runs.append((chosen[field], {"method": method.title, "symbol": symbol, "field": field}))
        return runs

    def tables(self, study: Study, done: Done) -> Findings:
        """Return all values that were tried, and whether each was chosen and at the edge of its grid."""
        rows, shown = [], []
        for _, record, labels in done:
            sweep = record["result"]
            for candidate in sweep["tried"]:
                value, loss, chosen = candidate["value"], candidate["mean"], candidate["value"] == sweep["value"]
                # Below 0 there is no better value: 0 is not the edge of a grid.
                edge = sweep["at_the_edge"] and (value != 0 or len(sweep["tried"]) == 1)
                choice = "chosen" + ", at the edge of the grid" * edge if chosen else ""
                shown.append(
                    (f"{labels['symbol']} = {value:g}", "diverged" if loss is None else f"{loss:.4f}", choice)
                )
                row = {"method": labels["method"], "metric": "held-out loss", "unit": "nats/token", "estimate": loss}
                rows.append({**row, "domain": self.domain, labels["field"]: value, "chosen": chosen})
        wide = pd.DataFrame(shown, columns=["Value", "Held-out loss", "Choice"]).set_index("Value")
        text = (
            f"Loss on held-out rows of {study.recipe.domains[self.domain].title} after training, nats per token. Each "
            f"sweep keeps what the ones above it chose, at the learning rate of {study.row(self.method).title}. The "
            "study's other rows keep the settings of the recipe."
        )
        tables = {"": ("What was tried and what was chosen", wide)}
        return Findings(pd.DataFrame(rows).dropna(subset="estimate"), tables, text=text)
