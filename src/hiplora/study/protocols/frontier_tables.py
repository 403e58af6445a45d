"""How the frontiers of a domain are shown: each method at its best rate, drift at equal learning, who is below whom."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from hiplora.reporting import interval, plots

OVER = "all texts"  # the geometric mean over the texts unlike the reference's calibration text
GROUPS = {  # kind of method → end of the file's name, what the caption says
    "plain": ("lora", "against plain LoRA"),
    "own": ("own", "and its variants"),
    "rival": ("rivals", "against rivals"),
}
POINT = ["method", "lr", "steps"]


def domain_tables(
    numbers: pd.DataFrame, stem: str, title: str, reference: str, rates: Sequence[float]
) -> dict[str, tuple[str, pd.DataFrame]]:
    """Return a domain's tables by file name."""
    found = {f"{stem}-best": (f"{title}: each method at its best rate", _best(numbers, rates))}
    ratios = numbers[numbers.metric.str.startswith("drift ratio")]
    if ratios.empty:
        return found
    best = ratios[ratios.which.notna()]
    which = best[best.operating.astype(bool) & (best.text == OVER)].which
    named = f"Best plain LoRA ({which.iloc[0]})" if len(which) else "Best plain LoRA"
    ratios = ratios.assign(row=ratios.method.where(ratios.which.isna(), named), told=ratios.apply(_told, axis=1))
    order = sorted(ratios.row.unique(), key=lambda row: row != named)
    operating, loss = ratios.operating.astype(bool), ratios.metric == "drift ratio at equal loss"
    overall = ratios.text == OVER
    equal = ratios[operating & (loss | overall)]
    equal = equal.assign(column=equal.text.where(loss, f"{OVER}, at equal likelihood"))
    texts = sorted(equal.column.unique(), key=lambda text: (text != OVER, "likelihood" in text, text))
    at = ratios[operating & loss & overall].set_index("row").loss.map("{:.3f}".format)
    wide = _wide(equal, order, texts)
    wide.insert(0, "Held-out loss", at)
    caption = f"{title}: drift at the lowest loss that both reached, against {reference}"
    found[f"{stem}-equal"] = caption, wide.fillna("–")
    each = ratios[~operating & loss & overall]
    each = each.assign(column=[_point(row) + f" (loss {row.loss:.3f})" for row in each.itertuples()])
    caption = f"{title}: drift over {OVER} at equal loss, against {reference} at each of its rates"
    found[f"{stem}-rates"] = caption, _wide(each, order, each.column.unique())
    below = numbers[numbers.metric == "share of losses below"].set_index("method").rename_axis("Method")
    shown = below.reindex(columns=["everywhere", "somewhere", "nowhere", "no common losses"])
    shown = shown.astype(int).add_prefix("Seeds: ")
    shown.insert(0, "Share of common losses, %", (100 * below.estimate).round(1))
    found[f"{stem}-below"] = f"{title}: where a method's frontier lies below that of {reference}", shown
    return found


def _wide(ratios: pd.DataFrame, rows: Sequence[str], columns: Sequence[str]) -> pd.DataFrame:
    wide = ratios.pivot(index="row", columns="column", values="told").reindex(index=rows, columns=columns)
    return wide.fillna("–").rename_axis(index="Method", columns=None)


def _best(numbers: pd.DataFrame, rates: Sequence[float]) -> pd.DataFrame:
    """Each method at the rate with the lowest mean held-out loss."""
    losses = numbers[numbers.metric == "held-out loss"]
    best = losses[losses.best].set_index(POINT)

    def there(metric: str, text: str | None = None) -> pd.DataFrame:
        rows = numbers[(numbers.metric == metric) & (text is None or numbers.text == text)]
        return rows.set_index(POINT).reindex(best.index)

    found = pd.DataFrame(index=best.index)
    edges = (min(rates), max(rates))
    found["Rate"] = [f"{rate:g}" + ", at the edge" * (rate in edges) for _, rate, _ in best.index]
    found["Held-out loss"] = best.estimate.map("{:.3f}".format)
    found["Likelihood, %"] = there("score").estimate.round(1)
    for text in numbers[numbers.metric == "geometric drift"].text.unique():
        found[f"KL, {text}, 1/1000"] = (1000 * there("geometric drift", text).estimate).round(2)
    drops = there("likelihood drop")
    if drops.estimate.notna().any():
        found["Drop elsewhere, pp"] = [interval(r.estimate, r.low, r.high) for r in drops.itertuples()]
    return found.reset_index(["lr", "steps"], drop=True).rename_axis("Method")


def _told(row: Any) -> str:
    if row.state == "reached":
        return interval(row.estimate, row.low, row.high, 2)
    if row.state == "not reached":
        return f"≥ {row.estimate:.3g} (not reached)"
    return f"≤ {row.estimate:.3g} (learned more)"


def _point(row: Any) -> str:
    return f"{row.lr:g}" + ("" if np.isinf(row.steps) else f", {row.steps:.0f} steps")


def domain_figures(
    numbers: pd.DataFrame, stem: str, title: str, reference: str, kinds: dict[str, str]
) -> dict[str, tuple]:
    """Return a domain's figures of drift against loss: of the plain LoRAs, the reference's variants and the rivals.

    `kinds` is title → `plain`, `own` or `rival`. Points that learned nothing are left out: one method's highest rates
    would press all others into a corner.
    """
    losses = numbers[numbers.metric == "held-out loss"]
    losses = losses[losses.learned].set_index(POINT).estimate
    rows = numbers[numbers.metric == "geometric drift"].set_index(POINT).drop(columns="loss", errors="ignore")
    rows = rows.join(losses.rename("loss"), how="inner").reset_index()
    steps = ["" if np.isinf(n) else f", {n:.0f} steps" for n in rows.steps]
    rows = rows.assign(line=rows.method + steps).sort_values("lr", kind="stable")
    found = {}
    for kind, (group, told) in GROUPS.items():
        shown = rows[(rows.method.map(kinds) == kind) | (rows.method == reference)]
        if not set(shown.method) <= {reference}:
            figure = plots.facets(
                shown, "text", plots.lines, x="loss", y="estimate", line="line", logy=True,
                xlabel="held-out loss, nats a token", ylabel="KL from the base, nats a token",
            )  # fmt: skip
            found[f"{stem}-{group}"] = f"{title}: {reference} {told}, drift against loss", figure
    return found
