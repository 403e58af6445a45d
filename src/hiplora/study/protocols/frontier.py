"""Learning against drift: every method over one grid of learning rates, compared where both learned as much.

The drift of a method at some loss lies on its own frontier, tuned over its rates and early stops: the lowest drift at
which it learned at least as much. It is divided by the reference's, seed by seed; the geometric mean over the seeds has
the interval of Student's t.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field, model_validator

from hiplora.reporting import interval, plots
from hiplora.study.protocols.settings import AboveZero, Done, Findings, Positive, Protocol, Run, Study
from hiplora.study.records import BASE, Tables, joined, measured, tidy
from hiplora.study.statistics import averaged, geometric, replicates, student, summary

LOSS = "loss"
OVER = "all texts"  # the geometric mean over the texts unlike the reference's calibration text
BEST_PLAIN = "Best plain LoRA"
RATIO = "drift ratio at equal loss"
FLOOR = 1e-9  # nats per token: a divergence below it is rounding
POINT = ["method", "lr", "steps"]
REACHED, NOT_REACHED, PASSED = "reached", "not reached", "passed"
Floats = NDArray[np.float64]


class FrontierSettings(Protocol):
    """Learning against drift: every method of a domain at every learning rate and seed."""

    whole: ClassVar[tuple[str, ...]] = ("domain", *POINT)
    domains: dict[str, list[str]] = Field(min_length=1, description="Domain to train on → methods to compare there.")
    rates: list[AboveZero] = Field(min_length=2, description="Learning rates, for all methods.")
    early: dict[str, list[Positive]] = Field(default={}, description="Method → early stops: smaller numbers of steps.")
    early_domains: list[str] | None = Field(default=None, description="Domains of the early stops; all, if empty.")
    tasks: dict[str, Positive | None] = Field(default={}, description="Task → items to score; none: the domains'.")
    plain: list[str] = Field(min_length=1, description="The plain LoRAs: the best tuned of them is to be beaten.")
    reference: str = Field(description="The method that is compared with all others.")

    def named(self) -> Iterator[tuple[str, list[str], str]]:
        """Yield the methods of each domain too."""
        yield from super().named()
        yield from ((f"domains.{domain}", methods, "methods") for domain, methods in self.domains.items())

    @model_validator(mode="after")
    def _roles_are_compared(self) -> "FrontierSettings":
        for domain, methods in self.domains.items():
            if self.reference not in methods:
                raise ValueError(
                    f"`domains.{domain}` lacks the `reference` {self.reference!r}, which all are compared with; add it"
                )
        compared = set(itertools.chain(*self.domains.values()))
        for field, names in (("plain", self.plain), ("early", self.early)):
            if unknown := [name for name in names if name not in compared]:
                raise ValueError(f"`{field}` names {unknown[0]!r}, which no domain compares; add it to one")
        return self

    def runs(self, study: Study) -> list[Run]:
        """Train and score every method of a domain at every rate, number of steps and seed; score the base."""
        tasks = self.tasks or None
        runs: list[Run] = [(study.score(None, tasks), {"method": BASE})]
        for domain, methods in self.domains.items():
            for method in methods:
                row = study.row(method)
                stops = self.early.get(method, ()) if domain in (self.early_domains or (domain,)) else ()
                for steps, rate, seed in itertools.product((None, *stops), self.rates, study.seeds(self)):
                    adapter = study.adapter(row, domain, seed, lr=rate, steps=steps)
                    label = {"domain": domain, "method": row.title, "lr": rate, "steps": steps or math.inf}
                    runs += [(job, {**label, "seed": seed}) for job in (adapter, study.score(adapter, tasks))]
        return runs

    def tables(self, study: Study, done: Done) -> Findings:
        """Return for each domain each method at its best rate, and the drift ratios at equal learning."""
        records, reference = tidy(done), study.row(self.reference).title
        plain = [study.row(name).title for name in self.plain]
        findings, parts = Findings(), []
        for domain in self.domains:
            points, drops = self._points(study, records, domain)
            if points.empty:
                continue
            numbers = _compare(points, drops, reference, plain).assign(domain=domain)
            parts.append(numbers)
            title = study.recipe.domains[domain].title
            findings.tables |= _ratio_tables(numbers, domain, title, reference)
            findings.figures |= _figures(numbers, domain, title, reference, plain)
        findings.measured = joined(*parts)
        findings.text = (
            f"Ratios: how many times as far a method drifts as {reference} where it has learned as much, its lowest "
            "drift over rates and early stops, interpolated between neighbours on the grid (linear in the loss, "
            "logarithmic in the divergence). Geometric means over the seeds with 95 % intervals (Student's t over the "
            "seeds' paired log ratios). ≥: it never learned that much and drifts this far where it learned most. ≤: "
            f"all its points learned more. {OVER[0].upper()}{OVER[1:]}: the geometric mean over "
            f"{', '.join(self._unlike(study))}."
        )
        return findings

    def _unlike(self, study: Study) -> list[str]:
        """The drift texts other than the file that calibrated the reference; all, if there are no others."""
        texts = study.recipe.evaluation.drift.texts if study.recipe.evaluation.drift else {}
        calibration = getattr(study.row(self.reference).method, "calibration_text", None)
        return [text for text, source in texts.items() if source.partition(":")[0] != calibration] or list(texts)

    def _points(self, study: Study, records: pd.DataFrame, domain: str) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Each method's loss, likelihood and drift by text at each rate, number of steps and seed.

        And replicates of the mean fall of the other tasks' likelihoods below the base's, in percentage points.
        """
        own, index = study.recipe.domains[domain], [*POINT, "seed"]
        rows = records[records.domain == domain].astype({"lr": float, "steps": float})
        kl, others = rows.metric == "kl", (rows.metric == "likelihood") & (rows.task != own.task)
        names = {"held_out_after": LOSS, "held_out_before": "untrained", "likelihood": "likelihood"}
        columns = rows.task.where(kl, rows.metric.map(names).where(~others))
        points = rows.assign(column=columns).pivot_table("value", index, "column", sort=False)
        points = points.reindex(columns=dict.fromkeys([*names.values(), *sorted(points)]))
        texts = [text for text in self._unlike(study) if text in points]
        if texts:
            points[OVER] = np.exp(np.log(points[texts].clip(lower=FLOOR)).mean(axis=1))
        points = points[np.isfinite(points[LOSS]).groupby(level=POINT).transform("all")]
        base = records[(records.method == BASE) & (records.metric == "likelihood")]
        base = base[~base.task.isin(own.tasks) & base.task.isin(rows.task[others])]
        if base.empty or points.empty:
            return points, pd.DataFrame()
        before = replicates(base, ["task"])
        after = replicates(rows[others & rows.task.isin(base.task)], [*index, "task"])
        fall = before.reindex(after.index.get_level_values("task")).to_numpy() - after.to_numpy()
        return points, averaged(pd.DataFrame(fall, after.index), ["task"])


class Frontier:
    """The lower envelope of a method's points, each with a rate, steps, and by seed a loss x and log drift y.

    Between neighbours on the grid (the next rate, or the next number of steps) y is linear in x; never beyond them.
    """

    def __init__(self, rates: Floats, steps: Floats, x: Floats, y: Floats):
        self.rates, self.steps, self.x, self.y = rates, steps, x, y
        self.mean_x, self.mean_y = x.mean(axis=1), y.mean(axis=1)
        self.best = int(self.mean_x.argmin())  # the point that learned most
        self.least, self.most = float(self.mean_x.min()), float(self.mean_x.max())
        pairs = [(point, point) for point in range(len(x))]
        for fixed, varied in ((steps, rates), (rates, steps)):
            lines = (np.flatnonzero(fixed == value) for value in np.unique(fixed))
            pairs += [pair for line in lines for pair in itertools.pairwise(line[varied[line].argsort()])]
        self.pairs = np.array([sorted(pair, key=lambda point: -self.mean_x[point]) for pair in pairs])

    def at(self, x: float) -> tuple[float, tuple[int, int], str]:
        """Return the mean log drift at a mean x, the points that it lies between or at, and its state.

        `not reached`: it never learned that much, this is where it learned most; `passed`: all its points learned more.
        """
        if x < self.least:
            return self.mean_y[self.best], (self.best, self.best), NOT_REACHED
        pairs = self.pairs[self.mean_x[self.pairs[:, 1]] <= x]
        y = _between(self.mean_x, self.mean_y, pairs.T, x)
        lowest = y.argmin()
        return float(y[lowest]), tuple(pairs[lowest].tolist()), REACHED if x <= self.most else PASSED

    def by_seed(self, x: Floats, points: tuple[int, int]) -> Floats:
        """Return each seed's log drift at its own x, (seeds,), between two points and never beyond them."""
        return _between(self.x, self.y, points, x)


def _between(x: Floats, y: Floats, points: Any, at: Any) -> Floats:
    """Interpolate y at some x between two points, or two arrays of points, never beyond them."""
    first, second = points
    distance = x[first] - x[second]
    share = np.where(distance > 0, (x[first] - at) / np.where(distance > 0, distance, 1.0), x[first] > at)
    share = share.clip(0.0, 1.0)
    return (1 - share) * y[first] + share * y[second]


def compared(method: Frontier, reference: Frontier, at: int | None) -> tuple[Floats, float, str]:
    """Return by seed the log of how many times as far a method drifts as the reference, at what x, and its state.

    x is what a point `at` of the reference learned or, where that is None, the most that both learned.
    """
    if at is None and method.least > reference.least:
        logs, x, state = compared(reference, method, method.best)
        return -logs, x, NOT_REACHED if state == PASSED else REACHED  # passed: the reference may drift less
    point = reference.best if at is None else at
    x = float(reference.mean_x[point])
    _, points, state = method.at(x)
    return method.by_seed(reference.x[point], points) - reference.y[point], x, state


def _compare(points: pd.DataFrame, drops: pd.DataFrame, reference: str, plain: list[str]) -> pd.DataFrame:
    """All measurements of a domain."""
    means = points[[LOSS, "untrained"]].groupby(level=POINT, sort=False).mean()
    whole = means[LOSS][np.isinf(means.index.get_level_values("steps"))].groupby(level="method", sort=False)
    loss = measured(student(points[LOSS]), "held-out loss", "nats/token")
    loss["learned"] = (means[LOSS] < means.untrained).to_numpy()
    loss["best"] = means.index.isin(whole.idxmin())
    parts = [loss, measured(student(points.likelihood.dropna()), "score", "%", form="likelihood")]
    texts = [name for name in points if name not in (LOSS, "untrained", "likelihood")]
    for text in texts:
        drift = geometric(points[text].clip(lower=FLOOR))
        parts.append(measured(drift, "geometric drift", "nats/token", text=text))
    if not drops.empty:
        parts.append(measured(summary(drops), "likelihood drop", "pp", form="likelihood"))
    ratios = [row for text in texts for row in _ratios(points[[LOSS, text]], reference, plain)]
    if ratios:
        rows = pd.DataFrame(ratios)
        logs = pd.DataFrame(rows.pop("logs").tolist()).stack().rename_axis(["row", "seed"])
        rows = geometric(np.exp(logs)).join(rows).assign(metric=RATIO, over=reference, unit="ratio")
        rows.loc[rows.state == PASSED, "low"] = np.nan  # a bound has no end on its open side
        rows.loc[rows.state == NOT_REACHED, "high"] = np.nan
        parts.append(rows)
    return joined(*parts, columns=["which"])


def _ratios(points: pd.DataFrame, reference: str, plain: list[str]) -> Iterator[dict[str, Any]]:
    """How many times as far each method drifts as the reference at equal loss (`logs`: logarithms by seed).

    At the most that both learned, and at each of the reference's points.
    """
    text, frontiers = points.columns[1], {}
    for method, rows in points.unstack("seed", sort=False).dropna().groupby(level="method", sort=False):
        rates, steps = (rows.index.get_level_values(name).to_numpy() for name in ("lr", "steps"))
        drifts = np.log(rows[text].clip(lower=FLOOR).to_numpy())
        frontiers[method] = Frontier(rates, steps, rows[LOSS].to_numpy(), drifts)
    if reference not in frontiers:
        return
    own = frontiers.pop(reference)
    for at in (None, *range(len(own.rates))):
        label = {"text": text, "operating": at is None}
        label |= {"lr": own.rates[at], "steps": own.steps[at]} if at is not None else {}
        ratios = []
        for method, frontier in frontiers.items():
            logs, x, state = compared(frontier, own, at)
            ratios.append({**label, "method": method, "logs": logs, LOSS: x, "state": state})
        yield from ratios
        # Of the plain LoRAs, those that learned as much count first; then the one that drifts least.
        lora = [ratio for ratio in ratios if ratio["method"] in plain]
        if lora:
            best = min(lora, key=lambda ratio: (ratio["state"] == NOT_REACHED, ratio["logs"].mean()))
            yield {**best, "method": BEST_PLAIN, "which": best["method"]}


def _ratio_tables(numbers: pd.DataFrame, domain: str, title: str, reference: str) -> Tables:
    """The ratios at the lowest loss that both reached, by text, and at each of the reference's points."""
    ratios = numbers[numbers.metric == RATIO]
    if ratios.empty:
        return {}
    ratios = ratios.assign(cell=ratios.apply(_cell, axis=1))
    operating, overall = ratios.operating.astype(bool), ratios.text == OVER

    def titled(rows: pd.DataFrame) -> pd.DataFrame:
        """The rows with their title, the best plain LoRA first: the one that it is, or those that it is in turn."""
        best = f"{BEST_PLAIN} ({'; '.join(rows.which.dropna().unique())})"
        rows = rows.assign(row=rows.method.where(rows.which.isna(), best))
        return rows.sort_values("row", key=lambda row: row != best, kind="stable")

    def wide(rows: pd.DataFrame, column: str, columns: Sequence[str]) -> pd.DataFrame:
        cells = rows.pivot(index="row", columns=column, values="cell")
        return cells.reindex(index=rows.row.unique(), columns=columns).rename_axis(index="Method", columns=None)

    at_most = titled(ratios[operating])
    equal = wide(at_most, "text", sorted(ratios.text.unique(), key=lambda text: (text != OVER, text)))
    equal.insert(0, "Held-out loss", at_most[at_most.text == OVER].set_index("row").loss.map("{:.3f}".format))
    each = ratios[~operating & overall]
    each = titled(each.assign(column=[f"{r.lr:g}{_stop(r.steps)} (loss {r.loss:.3f})" for r in each.itertuples()]))
    at_equal_loss = f"{title}: drift at the lowest loss that both reached, against {reference}"
    at_rates = f"{title}: drift over {OVER} at equal loss, against {reference} at each of its rates"
    return {
        f"{domain}-equal": (at_equal_loss, equal.fillna("–")),
        f"{domain}-rates": (at_rates, wide(each, "column", each.column.unique()).fillna("–")),
    }


def _cell(row: Any) -> str:
    if row.state == NOT_REACHED:
        return f"≥ {row.estimate:.3g} (not reached)"
    if row.state == PASSED:
        return f"≤ {row.estimate:.3g} (learned more)"
    return interval(row.estimate, row.low, row.high, 2)


def _stop(steps: float) -> str:
    return "" if np.isinf(steps) else f", {steps:.0f} steps"


def _figures(numbers: pd.DataFrame, domain: str, title: str, reference: str, plain: list[str]) -> dict[str, tuple]:
    """A domain's figures of drift against loss: of the plain LoRAs and of the others, each with the reference.

    Points that learned nothing are left out: one method's highest rates would press all others into a corner.
    """
    losses = numbers[numbers.metric == "held-out loss"]
    losses = losses[losses.learned.astype(bool)]
    rows = numbers[numbers.metric == "geometric drift"].drop(columns="loss", errors="ignore")
    rows = rows.join(losses.set_index(POINT).estimate.rename("loss"), on=POINT, how="inner")
    rows = rows.assign(line=rows.method + rows.steps.map(_stop)).sort_values("lr", kind="stable")
    figures = {}
    for group, shown, description in (
        ("lora", rows.method.isin(plain), "plain LoRA"),
        ("rivals", ~rows.method.isin([*plain, reference]), "rivals"),
    ):
        if shown.any():
            figure = plots.facets(
                rows[shown | (rows.method == reference)], "text", plots.lines, x="loss", y="estimate", line="line",
                logy=True, xlabel="held-out loss, nats per token", ylabel="KL from the base, nats per token",
            )  # fmt: skip
            caption = f"{title}: {reference} against {description}, drift against loss"
            figures[f"{domain}-{group}"] = caption, figure
    return figures
