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
    rows = []
    title = study.row(settings.method).title
    for symbol, field, choice in _stages(study, settings):
        found = results.get(choice)
        needs = {one["value"]: one["needs"] for one in choice.settings["candidates"]}
        for tried in found["tried"] if found is not None else ():
            chosen = tried["value"] == found["value"]
            # Below 0 there is no better value: 0 is not the edge of a grid.
            edge = bool(
                chosen and found["at_the_edge"] and not (tried["value"] == 0 and len(found["tried"]) > 1)
            )
            used = [choice.needs[need].key[:8] for need in needs[tried["value"]]]
            rows.append(
                {
                    "method": title, "metric": "held-out loss", "unit": "nats/token", "domain": settings.domain,
                    "estimate": tried["mean"], "seeds": len(used), "jobs": " ".join(used), "symbol": symbol,
                    field: tried["value"], "value": tried["value"], "chosen": chosen, "at_the_edge": edge,
                }
            )  # fmt: skip
    numbers = pd.DataFrame(rows)
    found = Findings(settings.name, settings.title, numbers)
    if rows:
        shown = pd.DataFrame(
            {
                "Value": [f"{row.symbol} = {row.value:g}" for row in numbers.itertuples()],
                "Held-out loss": [
                    "diverged" if pd.isna(loss) else f"{loss:.4f}" for loss in numbers.estimate
                ],
                "Choice": [
                    "chosen" + ", at the edge of the grid" * edge if chosen else ""
                    for chosen, edge in zip(numbers.chosen, numbers.at_the_edge, strict=True)
                ],
            }
        )
        found.tables[settings.name] = "What was tried and what was chosen", shown.set_index("Value")
        found.measured = numbers.drop(columns=["symbol", "value"])[numbers.estimate.notna()]
    found.text = (
        f"Loss on held-out rows of {study.recipe.domains[settings.domain].title} after training, nats a token. Each "
        f"sweep keeps what the ones above it chose, at the learning rate of {title}. The study's other rows keep "
        "the settings of the recipe."
    )
    return found


def _stages(study: Study, settings: Selection) -> Iterator[tuple[str, str, Job]]:
    """Yield the sweeps in order: symbol, field of the method, the job that chooses."""
    like = study.row(settings.method)
    rates = study.recipe.rates
    seeds = list(settings.seeds or [study.recipe.seeds[0] if rates is None else rates.seed])
    chosen: dict[str, Job] = {}
    for symbol, field, values in (
        ("λ", "stability_weight", settings.lambdas),
        ("γ", "stability_gamma", settings.gammas),
        ("r", "r", settings.residual_ranks),
        ("k", "principal_rank", settings.ranks),
    ):
        if not values:
            continue
        before, candidates = "".join(f", chosen {name}" for name in chosen), {}
        for value in values:
            row = study.variant(
                settings.method, f"{like.title}, {symbol} = {value:g}{before}", **{field: value}
            )
            candidates[value] = {
                f"{settings.domain}-{value:g}-{seed}": study.adapter(
                    row, settings.domain, seed, like=like, chosen=dict(chosen)
                )
                for seed in seeds
            }
        chosen[field] = study.choice(f"{symbol} of {like.title}", candidates)
        yield symbol, field, chosen[field]
