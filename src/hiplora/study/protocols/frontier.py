"""Learning against drift: every method over one grid of learning rates, compared where both learned as much.

The drift of a method at some loss lies on its own frontier (`envelope.py`), tuned over its rates and early stops. It is
divided by the reference's, seed by seed; the geometric mean over the seeds has the interval of Student's t.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from hiplora.study.protocols.envelope import NOT_REACHED, PASSED, Frontier, compared, share_below
from hiplora.study.protocols.frontier_tables import OVER, domain_figures, domain_tables
from hiplora.study.protocols.settings import Positive, Protocol
from hiplora.study.records import BASE, Findings, joined, measured, scored, tidy, with_jobs
from hiplora.study.statistics import averaged, geometric, replicates, student, summary

if TYPE_CHECKING:
    from hiplora.study.builder import Study
    from hiplora.study.jobs import Job
    from hiplora.study.store import Results

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
    rates: list[Annotated[float, Field(gt=0)]] = Field(min_length=2, description="Learning rates, for all methods.")
    early: dict[str, list[Positive]] = Field(
        default={}, description="Method → further, smaller numbers of steps: early stops."
    )
    early_domains: list[str] | None = Field(default=None, description="Domains of the early stops; all, if empty.")
    tasks: dict[str, Positive | None] = Field(
        default={},
        description="Tasks whose likelihoods are a drift too, with their items; none: all of the domains'.",
    )
    plain: list[str] = Field(
        min_length=1,
        description="The plain LoRAs among the methods: the best tuned of them is what is to be beaten.",
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
        known = set(itertools.chain(*self.domains.values()))
        for field, names in (("plain", self.plain), ("early", self.early)):
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
    reference = study.row(settings.reference).title
    plain = [study.row(name).title for name in settings.plain]
    found = Findings(settings.name, settings.title)
    parts = []
    for domain in settings.domains:
        points, drops = _points(study, settings, records, domain)
        if points.empty:
            continue
        numbers = with_jobs(_compare(points, drops, reference, plain).assign(on=domain), runs, ("on", "method"))
        parts.append(numbers.drop(columns="on").assign(domain=domain))
        stem, title = f"{settings.name}-{domain}", study.recipe.domains[domain].title
        found.tables |= domain_tables(parts[-1], stem, title, reference, settings.rates)
        found.figures |= domain_figures(parts[-1], stem, title, reference, _kinds(study, settings))
    found.measured = joined(*parts)
    found.text = (
        f"Ratios: how many times as far a method drifts as {reference} where it has learned as much, its lowest "
        "drift over rates and early stops, interpolated between neighbours on the grid (linear in the loss, "
        "logarithmic in the divergence). Geometric means over the seeds with 95 % intervals (Student's t over the "
        "seeds' paired log ratios). ≥: it never learned that much and drifts this far where it learned most. ≤: "
        f"all its points learned more. {OVER[0].upper()}{OVER[1:]}: the geometric mean over "
        f"{', '.join(_unlike(study, settings))}. Drop elsewhere: mean fall of the likelihoods of the other tasks, "
        "in percentage points."
    )
    return found


def _runs(study: Study, settings: FrontierSettings) -> Iterator[tuple[Job, dict]]:
    tasks = settings.tasks or None
    yield study.score(None, tasks), {"method": BASE}
    for domain, methods in settings.domains.items():
        for method in methods:
            row = study.row(method)
            stops = settings.early.get(method, ()) if domain in (settings.early_domains or (domain,)) else ()
            for steps, rate, seed in itertools.product((None, *stops), settings.rates, study.seeds(settings)):
                adapter = study.adapter(row, domain, seed, lr=rate, steps=steps)
                point = {"method": row.title, "lr": rate, "steps": steps or math.inf}
                label = {"on": domain, **point, "seed": seed}
                yield adapter, label
                yield study.score(adapter, tasks, drift=True), label


def _unlike(study: Study, settings: FrontierSettings) -> list[str]:
    """The drift texts that are not of the file that calibrated the reference; all, if none is left."""
    drift = study.recipe.evaluation.drift
    texts = drift.texts if drift is not None else {}
    calibration = getattr(study.row(settings.reference).method, "calibration_text", None)
    return [text for text, source in texts.items() if source.partition(":")[0] != calibration] or list(texts)


def _kinds(study: Study, settings: FrontierSettings) -> dict[str, str]:
    """Title of a method → `own` (the reference and others in its basis), `plain` or `rival`."""
    kinds = {}
    for name in itertools.chain(*settings.domains.values()):
        method = study.row(name).method
        is_own = name == settings.reference or (method.name == "hiplora" and method.preset != "paper")
        kinds[study.row(name).title] = "plain" if name in settings.plain else "own" if is_own else "rival"
    return kinds


def _points(
    study: Study, settings: FrontierSettings, records: pd.DataFrame, domain: str
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Each method's loss, likelihood and drift by text at each rate, number of steps and seed; and its drops.

    Drops are replicates of the mean fall of the other tasks' likelihoods below the base's, in percentage points.
    """
    own = study.recipe.domains[domain]
    rows = records[records.on == domain].astype({"lr": float, "steps": float})
    index = [*POINT, "seed"]
    items = scored(rows)
    items = items[items.form == "likelihood"]
    wide = {
        LOSS: rows[rows.metric == "held_out_after"],
        "untrained": rows[rows.metric == "held_out_before"],
        LIKELIHOOD: items[items.task == own.task],
    }
    kl = rows[rows.metric == "kl"].pivot(index=index, columns="task", values="value")
    means = {name: one.groupby(index, sort=False)["value"].mean() for name, one in wide.items()}
    points = pd.DataFrame(means).join(kl)
    if len(kl.columns):
        points[OVER] = np.exp(np.log(kl[_unlike(study, settings)].clip(lower=FLOOR)).mean(axis=1))
    points = points[np.isfinite(points[LOSS]).groupby(level=POINT).transform("all")]
    base = scored(records[records.method == BASE])
    base = base[(base.form == "likelihood") & ~base.task.isin(own.tasks) & base.task.isin(items.task)]
    if base.empty or points.empty:
        return points, pd.DataFrame()
    before = replicates(base, ["task"])
    after = replicates(items[items.task.isin(base.task)], [*index, "task"])
    fall = before.reindex(after.index.get_level_values("task")).to_numpy() - after.to_numpy()
    return points, averaged(pd.DataFrame(fall, after.index), ["task"])


def _compare(points: pd.DataFrame, drops: pd.DataFrame, reference: str, plain: list[str]) -> pd.DataFrame:
    """All measurements of a domain."""
    means = points[[LOSS, "untrained"]].groupby(level=POINT, sort=False).mean()
    whole = means[np.isinf(means.index.get_level_values("steps"))]
    best = {method: one.idxmin() for method, one in whole[LOSS].groupby(level="method", sort=False)}
    loss = measured(student(points[LOSS]), "held-out loss", "nats/token")
    loss["learned"] = (means[LOSS] < means.untrained).to_numpy()
    loss["best"] = means.index.isin(list(best.values()))
    parts = [loss, measured(student(points[LIKELIHOOD].dropna()), "score", "%", form="likelihood")]
    texts = [name for name in points if name not in (LOSS, "untrained", LIKELIHOOD)]
    for text in texts:
        drift = points[text]
        parts.append(measured(student(drift), "drift", "nats/token", text=text))
        drift = geometric(drift.clip(lower=FLOOR))
        parts.append(measured(drift, "geometric drift", "nats/token", text=text))
    if not drops.empty:
        parts.append(measured(summary(drops), "likelihood drop", "pp", form="likelihood"))
    if reference not in best:
        return joined(*parts)
    return joined(*parts, _ratios(points, texts, reference, plain), _below(points, reference))


def _frontiers(points: pd.DataFrame, view: str, text: str) -> dict[str, Frontier]:
    """Method → its frontier of loss or likelihood against a drift."""
    wide = points[[view, text]].unstack("seed", sort=False).dropna()
    found = {}
    for method, one in wide.groupby(level="method", sort=False):
        rates, steps = (one.index.get_level_values(name).to_numpy() for name in ("lr", "steps"))
        learned = one[view].to_numpy() * (1 if view == LOSS else -1)
        found[method] = Frontier(rates, steps, learned, np.log(one[text].clip(lower=FLOOR).to_numpy()))
    return found


def _ratios(points: pd.DataFrame, texts: list[str], reference: str, plain: list[str]) -> pd.DataFrame:
    """How many times as far each method drifts as the reference, at the most that both learned and at its points."""
    rows, logs = [], []
    for view, text in itertools.product((LOSS, LIKELIHOOD), texts):
        frontiers = _frontiers(points, view, text)
        there = frontiers.pop(reference, None)
        if there is None:
            continue
        for at in (None, *range(len(there.rates))):
            known = []
            for method, here in frontiers.items():
                apart, x, state = compared(here, there, at)
                label = {
                    "metric": f"drift ratio at equal {view}",
                    "method": method,
                    "text": text,
                    view: abs(x),
                }
                label |= {"state": state, "operating": at is None}
                label |= {"lr": there.rates[at], "steps": there.steps[at]} if at is not None else {}
                known.append((label, apart))
            # Of the plain LoRAs, those that learned as much count first; then the one that drifts least.
            lora = [one for one in known if one[0]["method"] in plain]
            if lora:
                label, apart = min(lora, key=lambda one: (one[0]["state"] == NOT_REACHED, one[1].mean()))
                known.append(({**label, "method": BEST_PLAIN, "which": label["method"]}, apart))
            rows += [label for label, _ in known]
            logs += [apart for _, apart in known]
    if not rows:
        return pd.DataFrame()
    values = pd.DataFrame(logs).stack().rename_axis(["row", "seed"])
    found = geometric(np.exp(values)).join(pd.DataFrame(rows)).assign(over=reference, unit="ratio")
    found.loc[found.state == PASSED, "low"] = np.nan  # a bound has no end on its open side
    found.loc[found.state == NOT_REACHED, "high"] = np.nan
    return found


def _below(points: pd.DataFrame, reference: str) -> pd.DataFrame:
    """On what share of their common losses each method lies below the reference, on the mean and by seed."""
    frontiers = _frontiers(points, LOSS, OVER) if OVER in points else {}
    there = frontiers.pop(reference, None)
    if there is None:
        return pd.DataFrame()
    rows = []
    for method, here in frontiers.items():
        share = share_below(here, there)
        if share is None:
            continue
        seeds = [share_below(here.of_seed(seed), there.of_seed(seed)) for seed in range(here.x.shape[1])]
        known = [one for one in seeds if one is not None]
        counts = {"everywhere": known.count(1.0), "nowhere": known.count(0.0)}
        counts |= {"somewhere": len(known) - sum(counts.values()), "no common losses": seeds.count(None)}
        rows.append({"method": method, "estimate": share, "seeds": len(seeds), **counts})
    return pd.DataFrame(rows).assign(metric="share of losses below", unit="fraction", text=OVER)
