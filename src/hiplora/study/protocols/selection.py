"""λ, γ, r and k chosen on held-out rows, one after the other: the paper's coarse-to-fine selection."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import pandas as pd
from pydantic import Field

from hiplora.study.protocols.settings import AtLeastZero, Positive, Protocol
from hiplora.study.records import Findings

if TYPE_CHECKING:
    from hiplora.study.builder import Study
    from hiplora.study.jobs import Job
    from hiplora.study.store import Results


class Selection(Protocol):
    """Coarse to fine on held-out rows: λ at the given γ and k, then γ, then r if some are named, then k."""

    name: ClassVar[str] = "selection"
    title: ClassVar[str] = "Selection of λ, γ, r and k"
    method: str = Field(description="A HiP-LoRA with gains.")
    domain: str = Field(description="Domain whose held-out rows decide.")
    lambdas: list[AtLeastZero] = Field(min_length=1, description="λ to try.")
    gammas: list[AtLeastZero] = Field(min_length=1, description="γ to try.")
    residual_ranks: list[Positive] = Field(
        default=[], description="r to try, at the same `lora_alpha`; none: r is as the method has it."
    )
    ranks: list[Positive] = Field(min_length=1, description="k to try.")


def jobs(study: Study, settings: Selection) -> list[Job]:
    """The choices, each over trainings at what was chosen before."""
    return [job for _, _, job in _stages(study, settings)]


def tables(study: Study, settings: Selection, results: Results) -> Findings:
    """Return everything that was tried, with what was chosen and whether at the edge of its grid."""
    title, rows, shown = study.row(settings.method).title, [], []
    for symbol, field, choice in _stages(study, settings):
        swept = results.get(choice) or {"tried": []}
        needs = {one["value"]: one["needs"] for one in choice.settings["candidates"]}
        for tried in swept["tried"]:
            value, loss, chosen = tried["value"], tried["mean"], tried["value"] == swept["value"]
            # Below 0 there is no better value: 0 is not the edge of a grid.
            edge = chosen and swept["at_the_edge"] and (value != 0 or len(swept["tried"]) == 1)
            used = [choice.needs[need].key[:8] for need in needs[value]]
            lost = loss is None
            told = ("chosen, at the edge of the grid" if edge else "chosen") if chosen else ""
            shown.append((f"{symbol} = {value:g}", "diverged" if lost else f"{loss:.4f}", told))
            if not lost:
                row = {"method": title, "metric": "held-out loss", "unit": "nats/token", "estimate": loss}
                row |= {"domain": settings.domain, "seeds": len(used), "jobs": " ".join(used), field: value}
                rows.append(row | {"chosen": chosen, "at_the_edge": edge})
    found = Findings(settings.name, settings.title, pd.DataFrame(rows))
    if shown:
        wide = pd.DataFrame(shown, columns=["Value", "Held-out loss", "Choice"]).set_index("Value")
        found.tables[settings.name] = "What was tried and what was chosen", wide
    found.text = (
        f"Loss on held-out rows of {study.recipe.domains[settings.domain].title} after training, nats a token. Each "
        f"sweep keeps what the ones above it chose, at the learning rate of {title}. The study's other rows keep "
        "the settings of the recipe."
    )
    return found


def _stages(study: Study, settings: Selection) -> Iterator[tuple[str, str, Job]]:
    """Yield the sweeps in order: symbol, field of the method, the job that chooses."""
    method, domain, rates = study.row(settings.method), settings.domain, study.recipe.rates
    seeds = settings.seeds or [study.recipe.seeds[0] if rates is None else rates.seed]
    chosen: dict[str, Job] = {}
    for symbol, field, values in (
        ("λ", "stability_weight", settings.lambdas),
        ("γ", "stability_gamma", settings.gammas),
        ("r", "r", settings.residual_ranks),
        ("k", "principal_rank", settings.ranks),
    ):
        before, candidates = "".join(f", chosen {name}" for name in chosen), {}
        for value in values:
            title = f"{method.title}, {symbol} = {value:g}{before}"
            row = study.variant(settings.method, title, **{field: value})
            candidates[value] = {
                f"{domain}-{value:g}-{seed}": study.adapter(row, domain, seed, like=method, chosen=chosen)
                for seed in seeds
            }
        if candidates:
            chosen[field] = study.choice(f"{symbol} of {method.title}", candidates)
            yield symbol, field, chosen[field]
