"""λ, γ, r and k chosen on held-out rows, one after the other: the paper's coarse-to-fine selection."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hiplora.recipes.protocols import Selection
from hiplora.reporting.study.spec import Cell, Measurement, Section, Table
from hiplora.study.builder import Study
from hiplora.study.engine.jobs import Job
from hiplora.study.protocols.show import measurement
from hiplora.study.results import Results
from hiplora.study.statistics import Estimate

NAME, TITLE = "selection", "Selection of λ, γ, r and k"


@dataclass(frozen=True)
class Stage:
    """One of the sweeps: what is swept, over which values, and the job that chooses."""

    symbol: str
    field: str
    values: Sequence[float]
    choice: Job


def jobs(study: Study, settings: Selection) -> list[Job]:
    """The choices, each over trainings at what was chosen before."""
    return [stage.choice for stage in stages(study, settings)]


def section(study: Study, settings: Selection, results: Results) -> Section:
    """A table of everything that was tried, with what was chosen and whether at the edge of its grid."""
    found = [(stage, results.get(stage.choice)) for stage in stages(study, settings)]
    done = [(stage, choice) for stage, choice in found if choice is not None]
    measurements = [one for stage, choice in done for one in _measurements(study, settings, stage, choice)]
    texts = [_told(done)] if done else []
    table = _table(study, settings, done)
    return Section(NAME, TITLE, texts, [table], (), measurements, list(results.missing))


def stages(study: Study, settings: Selection) -> list[Stage]:
    """Return the sweeps in order: λ, then γ at the chosen λ, then r at both, then k at all that was chosen."""
    found: list[Stage] = []
    for symbol, field, values in (
        ("λ", "stability_weight", settings.lambdas),
        ("γ", "stability_gamma", settings.gammas),
        ("r", "r", settings.residual_ranks),
        ("k", "principal_rank", settings.ranks),
    ):
        if not values:
            continue
        chosen = {stage.field: stage.choice for stage in found}
        candidates = {value: _trainings(study, settings, symbol, field, value, chosen) for value in values}
        title = study.row(settings.method).title
        found.append(Stage(symbol, field, values, study.choice(f"{symbol} of {title}", candidates)))
    return found


def _trainings(
    study: Study, settings: Selection, symbol: str, field: str, value: float, chosen: Mapping[str, Job]
) -> dict[str, Job]:
    """The trainings that speak for a value, at the learning rate of the method as it is given."""
    like = study.row(settings.method)
    before = "".join(f", chosen {name}" for name in chosen)
    row = study.variant(settings.method, f"{like.title}, {symbol} = {value:g}{before}", **{field: value})
    return {
        f"{settings.domain}-{value:g}-{seed}": study.adapter(
            row, settings.domain, seed, like=like, chosen=chosen
        )
        for seed in _seeds(study, settings)
    }


def _seeds(study: Study, settings: Selection) -> list[int]:
    """The protocol's own seeds, else that of the search for rates, else the study's first."""
    if settings.seeds is not None:
        return list(settings.seeds)
    rates = study.recipe.rates
    return [study.recipe.seeds[0] if rates is None else rates.seed]


def _edge(found: Mapping[str, Any]) -> bool:
    """Whether a better value may lie beyond the grid; below 0 there is none."""
    return bool(found["at_the_edge"]) and not (found["value"] == 0 and len(found["tried"]) > 1)


def _table(study: Study, settings: Selection, done: Sequence[tuple[Stage, dict[str, Any]]]) -> Table:
    lines = []
    for stage, found in done:
        for tried in found["tried"]:
            is_best = tried["value"] == found["value"]
            told = ("chosen, at the edge of the grid" if _edge(found) else "chosen") if is_best else ""
            told = "diverged" if tried["mean"] is None else told
            cells = [Cell(tried["mean"], digits=4, best=is_best), Cell(text=told)]
            lines.append((f"{stage.symbol} = {tried['value']:g}", cells))
    seeds = ", ".join(map(str, _seeds(study, settings)))
    note = (
        f"Loss on held-out rows of {study.recipe.domains[settings.domain].title} after training, nats a learned token, "
        f"seed {seeds}. Each sweep keeps what the ones above it chose; the learning rate is that of "
        f"{study.row(settings.method).title} as the study has it. Nothing else of the study takes the choice over: "
        "its other rows have the settings that the recipe gives."
    )
    return Table(
        NAME, "What was tried and what was chosen", ["Value", "Held-out loss", "Choice"], lines, note
    )


def _measurements(
    study: Study, settings: Selection, stage: Stage, found: Mapping[str, Any]
) -> Iterator[Measurement]:
    title = study.row(settings.method).title
    needs = {one["value"]: one["needs"] for one in stage.choice.settings["candidates"]}
    for tried in found["tried"]:
        if tried["mean"] is None:
            continue
        setting = {stage.field: tried["value"], "chosen": tried["value"] == found["value"]}
        setting |= {"at_the_edge": setting["chosen"] and _edge(found)}
        used = [stage.choice.needs[need] for need in needs[tried["value"]]]
        yield measurement(
            NAME, title, "held-out loss", Estimate(tried["mean"]), used, domain=settings.domain, unit="nats/token",
            setting=setting, seeds=len(used),
        )  # fmt: skip


def _told(done: Sequence[tuple[Stage, dict[str, Any]]]) -> str:
    chosen = ", ".join(f"{stage.symbol} = {found['value']:g}" for stage, found in done)
    spans = ", ".join(
        f"{max(losses) - min(losses):.4f} over {stage.symbol}"
        for stage, found in done
        if (losses := [tried["mean"] for tried in found["tried"] if tried["mean"] is not None])
    )
    edges = [stage.symbol for stage, found in done if _edge(found)]
    beyond = f" At the edge of the grid: {', '.join(edges)}; a wider one may find better." if edges else ""
    return f"Chosen: {chosen}. The held-out losses of a sweep lie this far apart, in nats a token: {spans}.{beyond}"
