"""Learning against drift: every method over one grid of learning rates, compared where both learned as much.

The drift of a method at some loss lies on its own frontier (`envelope.py`), tuned over its rates and early stops. It is
divided by the reference's, seed by seed; the geometric mean over the seeds has the interval of Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from hiplora.study.protocols.envelope import Frontier, Mark, compared, share_below
from hiplora.study.protocols.frontier_tables import domain_figures, domain_tables
from hiplora.study.protocols.settings import Positive, Protocol
from hiplora.study.records import BASE, Findings, joined, measured, scored, tidy, with_jobs
from hiplora.study.statistics import averaged, geometric, replicates, student, summary

if TYPE_CHECKING:
    from hiplora.study.builder import Study
    from hiplora.study.jobs import Job
    from hiplora.study.store import Results

OVER = "all texts"  # the geometric mean over the texts unlike the reference's calibration text
LOSS, LIKELIHOOD = "loss", "likelihood"
BEST_PLAIN = "Best plain LoRA"
FLOOR = 1e-9  # nats a token: a divergence below it is rounding
POINT = ["method", "lr", "steps"]


class FrontierSettings(Protocol):
    """Learning against drift: every method of a domain at every learning rate and seed."""

    name: ClassVar[str] = "frontier"
    title: ClassVar[str] = "Learning against drift"
    domains: dict[str, list[str]] = Field(
        min_length=1, description="Domain to train on → methods that are compared there."
    )
    rates: list[Annotated[float, Field(gt=0)]] = Field(
        min_length=2, description="Learning rates, for all methods."
    )
    early: dict[str, list[Positive]] = Field(
        default={}, description="Method → further, smaller numbers of steps: early stops."
    )
    early_domains: list[str] | None = Field(
        default=None, description="Domains of the early stops; all, if empty."
    )
    tasks: dict[str, Positive | None] = Field(
        default={},
        description="Tasks whose likelihoods are a drift too, with their items; none: all of the domains'.",
    )
    plain: list[str] = Field(
        min_length=1,
        description="The plain LoRAs among the methods: the best tuned of them is what is to be beaten.",
    )
    attention: str | None = Field(
        default=None, description="The one among them that adapts the attention only."
    )
    reference: str = Field(description="The method that is compared with all others.")

    def named(self, kind: str) -> Iterator[tuple[str, list[str]]]:
        """Yield the methods of each domain too."""
        yield from super().named(kind)
        if kind == "methods":
            for domain, methods in self.domains.items():
                yield f"domains.{domain}", methods

    @model_validator(mode="after")
    def _roles_are_compared(self) -> FrontierSettings:
        for domain, methods in self.domains.items():
            if self.reference not in methods:
                raise ValueError(
                    f"`domains.{domain}` lacks the `reference` {self.reference!r}, which all are compared with; add it"
                )
        known = {method for methods in self.domains.values() for method in methods}
        attention = [] if self.attention is None else [self.attention]
        for field, names in (("plain", self.plain), ("attention", attention), ("early", list(self.early))):
            for name in names:
                if name not in known:
                    raise ValueError(f"`{field}` names {name!r}, which no domain compares; add it to one")
        return self


def jobs(study: Study, settings: FrontierSettings) -> list[Job]:
    """Score the base, and every method of a domain at every rate, number of steps and seed."""
    return [job for job, _ in _runs(study, settings) if job.kind == "evaluate"]


def tables(study: Study, settings: FrontierSettings, results: Results) -> Findings:
    """Return for each domain the points, the drift ratios at equal learning, and who lies below whom."""
    runs = list(_runs(study, settings))
    records = tidy(results, runs, ("on", *POINT))
    records["domain"] = records["on"]
    found = Findings(settings.name, settings.title)
    parts = []
    for domain in settings.domains:
        points, drops = _points(study, settings, records, domain)
        if points.empty:
            continue
        numbers = _compare(study, settings, points, drops)
        numbers = with_jobs(numbers.assign(on=domain), runs, ("on", "method")).drop(columns="on")
        parts.append(numbers.assign(domain=domain))
        title = study.recipe.domains[domain].title
        found.tables |= domain_tables(study, settings, parts[-1], f"{settings.name}-{domain}", title)
        found.figures |= domain_figures(study, settings, parts[-1], f"{settings.name}-{domain}", title)
    found.measured = joined(*parts)
    reference = study.row(settings.reference).title
    found.text = (
        f"Ratios: how many times as far a method drifts as {reference} where it has learned as much, its lowest "
        "drift over rates and early stops, interpolated between neighbours on the grid (linear in the loss, "
        "logarithmic in the divergence). Geometric means over the seeds with 95 % intervals (Student's t over the "
        "seeds' paired log ratios). ≥: it never learned that much and drifts this far where it learned most. ≤: "
        f"all its points learned more. {OVER[0].upper()}{OVER[1:]}: the geometric mean over "
        f"{', '.join(unlike(study, settings))}. Drop elsewhere: mean fall of the likelihoods of the other tasks, in "
        "percentage points."
    )
    return found


def _runs(study: Study, settings: FrontierSettings) -> Iterator[tuple[Job, dict]]:
    tasks = settings.tasks or None
    yield study.score(None, tasks), {"method": BASE}
    for domain, methods in settings.domains.items():
        for method in methods:
            row = study.row(method)
            stops = settings.early.get(method, ()) if domain in (settings.early_domains or (domain,)) else ()
            for steps in (None, *stops):
                for rate in settings.rates:
                    for seed in study.seeds(settings):
                        adapter = study.adapter(row, domain, seed, lr=rate, steps=steps)
                        label = {
                            "on": domain,
                            "method": row.title,
                            "lr": rate,
                            "steps": steps or math.inf,
                            "seed": seed,
                        }
                        yield adapter, label
                        yield study.score(adapter, tasks, drift=True), label


def unlike(study: Study, settings: FrontierSettings) -> list[str]:
    """Return the drift texts that are not of the file that calibrated the reference; all, if none is left."""
    drift = study.recipe.evaluation.drift
    texts = drift.texts if drift is not None else {}
    calibration = getattr(study.row(settings.reference).method, "calibration_text", None)
    return [text for text, source in texts.items() if source.partition(":")[0] != calibration] or list(texts)


def _points(
    study: Study, settings: FrontierSettings, records: pd.DataFrame, domain: str
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return each method's loss, likelihood and drift by text at each rate, number of steps and seed; and its drops.

    Drops are replicates of the mean fall of the other tasks' likelihoods below the base's, in percentage points.
    """
    own = study.recipe.domains[domain]
    rows = records[records.domain == domain].astype({"lr": float, "steps": float})
    index = [*POINT, "seed"]
    wide = {
        name: rows[rows.metric == metric].groupby(index, sort=False)["value"].mean()
        for name, metric in ((LOSS, "held_out_after"), ("untrained", "held_out_before"))
    }
    items = scored(rows)
    items = items[items.form == "likelihood"]
    wide[LIKELIHOOD] = items[items.task == own.task].groupby(index, sort=False)["value"].mean()
    kl = rows[rows.metric == "kl"].pivot(index=index, columns="task", values="value")
    points = pd.DataFrame(wide).join(kl)
    if len(kl.columns):
        points[OVER] = np.exp(np.log(kl[unlike(study, settings)].clip(lower=FLOOR)).mean(axis=1))
    finite = points[LOSS].replace([np.inf, -np.inf], np.nan).notna().groupby(level=POINT).transform("all")
    points = points[finite]
    base = scored(records[records.method == BASE])
    others = [task for task in items.task.unique() if task not in own.tasks and task in set(base.task)]
    if not others or points.empty:
        return points, pd.DataFrame()
    before = replicates(base[(base.form == "likelihood") & base.task.isin(others)], ["method", "task"])
    after = replicates(items[items.task.isin(others)], [*index, "task"])
    fall = (
        before.droplevel("method").reindex(after.index.get_level_values("task")).to_numpy() - after.to_numpy()
    )
    return points, averaged(pd.DataFrame(fall, after.index), ["task"])


def _texts(points: pd.DataFrame) -> list[str]:
    texts = [name for name in points if name not in (LOSS, "untrained", LIKELIHOOD)]
    return [*(text for text in texts if text != OVER), *(text for text in texts if text == OVER)]


def _compare(
    study: Study, settings: FrontierSettings, points: pd.DataFrame, drops: pd.DataFrame
) -> pd.DataFrame:
    """All measurements of a domain."""
    texts = _texts(points)
    parts = [measured(student(points[LOSS]), "held-out loss", "nats/token")]
    parts += [measured(student(points[text]), "drift", "nats/token", text=text) for text in texts]
    parts += [
        measured(geometric(points[text].clip(lower=FLOOR)), "geometric drift", "nats/token", text=text)
        for text in texts
    ]
    parts.append(measured(student(points[LIKELIHOOD].dropna()), "score", "%", form="likelihood"))
    untrained = points["untrained"].groupby(level=POINT, sort=False).mean()
    means = points[LOSS].groupby(level=POINT, sort=False).mean()
    parts[0]["learned"] = (means < untrained).to_numpy()
    full = means[np.isinf(means.index.get_level_values("steps"))]
    best = {
        method: one.idxmin()
        for method, one in (means if full.empty else full).groupby(level="method", sort=False)
    }
    parts[0]["best"] = [label in best.values() for label in means.index]
    reference = study.row(settings.reference).title
    if not drops.empty:
        parts.append(measured(summary(drops), "likelihood drop", "pp", form="likelihood"))
        there = drops.xs(best[reference], level=POINT) if reference in best else None
        for method, label in best.items() if there is not None else ():
            if method != reference:
                apart = pd.concat({label: drops.xs(label, level=POINT) - there}, names=POINT)
                parts.append(
                    measured(
                        summary(apart), "likelihood drop difference", "pp", form="likelihood", minus=reference
                    )
                )
    if reference in best:
        parts += _ratios(study, settings, points, best, reference, texts)
        parts.append(_below(study, settings, points, reference))
    return joined(*parts)


def _marks(points: pd.DataFrame, view: str, text: str) -> dict[str, list[Mark]]:
    """Method → its points by loss or likelihood against a drift."""
    rows = points[[view, text]].dropna()
    found: dict[str, list[Mark]] = {}
    for (method, rate, steps), one in rows.groupby(level=POINT, sort=False):
        learned = one[view].to_numpy() * (1 if view == LOSS else -1)
        found.setdefault(method, []).append(
            Mark(rate, steps, learned, np.log(one[text].clip(lower=FLOOR).to_numpy()))
        )
    return found


def _ratios(
    study: Study,
    settings: FrontierSettings,
    points: pd.DataFrame,
    best: dict,
    reference: str,
    texts: list[str],
) -> list[pd.DataFrame]:
    """How many times as far each method drifts as the reference, at the most that both learned and at its points."""
    plain = {study.row(name).title for name in settings.plain}
    rows, logs = [], []
    for view in (LOSS, LIKELIHOOD):
        for text in texts:
            marks = _marks(points, view, text)
            if reference not in marks:
                continue
            there = Frontier(marks[reference])
            for at in (None, *marks[reference]):
                known = []
                for method, own in marks.items():
                    if method == reference:
                        continue
                    apart, x, state = compared(Frontier(own), there, at)
                    label = {
                        "method": method, "over": reference, "text": text, "state": state, "operating": at is None,
                        "view": view, view: abs(x), "lr": at.rate if at else np.nan,
                        "steps": at.steps if at else np.nan,
                    }  # fmt: skip
                    known.append((label, apart))
                # Of the plain LoRAs, those that learned as much count first; then the one that drifts least.
                lora = [one for one in known if one[0]["method"] in plain]
                lora = sorted(lora, key=lambda one: (one[0]["state"] == "not reached", one[1].mean()))[:1]
                known += [
                    ({**label, "method": BEST_PLAIN, "which": label["method"]}, apart)
                    for label, apart in lora
                ]
                for label, apart in known:
                    rows.append(label)
                    logs.append(apart)
    if not rows:
        return []
    values = pd.DataFrame(logs).stack().rename_axis(["row", "seed"])
    found = geometric(np.exp(values)).join(pd.DataFrame(rows))
    found.loc[found.state == "passed", "low"] = np.nan  # a bound has no end on its open side
    found.loc[found.state == "not reached", "high"] = np.nan
    return [found.assign(metric="drift ratio at equal " + found["view"], unit="ratio").drop(columns="view")]


def _below(study: Study, settings: FrontierSettings, points: pd.DataFrame, reference: str) -> pd.DataFrame:
    """On what share of their common losses each method lies below the reference, on the mean and by seed."""
    if OVER not in points:
        return pd.DataFrame()
    marks = _marks(points, LOSS, OVER)
    there = Frontier(marks[reference])
    kinds = {
        study.row(name).title: kind_of(study, settings, name)
        for names in settings.domains.values()
        for name in names
    }
    rows = []
    for method, own in marks.items():
        here = Frontier(own)
        share = share_below(here, there)
        if method == reference or share is None:
            continue
        seeds = [share_below(here.of_seed(seed), there.of_seed(seed)) for seed in range(len(own[0].x))]
        counts = {
            "everywhere": seeds.count(1.0),
            "nowhere": seeds.count(0.0),
            "no common losses": seeds.count(None),
        }
        counts["somewhere"] = len(seeds) - sum(counts.values())
        rows.append(
            {
                "method": method,
                "estimate": share,
                "kind": kinds[method],
                "than": reference,
                "seeds": len(seeds),
                **counts,
            }
        )
    return (
        pd.DataFrame(rows).assign(metric="share of losses below", unit="fraction", text=OVER)
        if rows
        else pd.DataFrame()
    )


def kind_of(study: Study, settings: FrontierSettings, method: str) -> str:
    """Return whether a method is `own` (the reference and others in its basis), `plain` or `rival`."""
    if method in settings.plain:
        return "plain"
    found = study.row(method).method
    is_own = found.name == "hiplora" and found.preset != "paper"
    return "own" if is_own or method == settings.reference else "rival"
