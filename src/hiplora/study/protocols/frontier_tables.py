"""How the frontiers of a domain are shown: each method at its best rate, drift at equal learning, who is below whom."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from hiplora.reporting import interval, plots

if TYPE_CHECKING:
    from hiplora.study.builder import Study

GROUPS = {
    "plain": ("lora", "against plain LoRA"),
    "own": ("own", "and its variants"),
    "rival": ("rivals", "against rivals"),
}
OVER = "all texts"


def domain_tables(
    study: Study, settings: Any, numbers: pd.DataFrame, stem: str, title: str
) -> dict[str, tuple]:
    """Return a domain's tables by file name."""
    found = {f"{stem}-best": (f"{title}: each method at its best rate", _best(settings, numbers))}
    reference = study.row(settings.reference).title
    ratios = numbers[numbers.metric.str.startswith("drift ratio")]
    if ratios.empty:
        return found
    which = ratios[ratios.which.notna() & ratios.operating.astype(bool) & (ratios.text == OVER)].which
    named = f"Best plain LoRA ({which.iloc[0]})" if len(which) else "Best plain LoRA"
    ratios = ratios.assign(
        row=ratios.method.where(ratios.which.isna(), named), told=[_told(row) for row in ratios.itertuples()]
    )
    order = sorted(ratios.row.unique(), key=lambda row: row != named)
    loss = ratios.metric == "drift ratio at equal loss"
    most = ratios[ratios.operating.astype(bool) & (loss | (ratios.text == OVER))]
    column = most.text.where(most.metric == "drift ratio at equal loss", f"{OVER}, at equal likelihood")
    equal = most.assign(column=column).pivot(index="row", columns="column", values="told")
    texts = sorted(equal.columns, key=lambda text: (text != OVER, "likelihood" in text))
    at = most[(most.metric == "drift ratio at equal loss") & (most.text == OVER)].set_index("row")["loss"]
    equal.insert(0, "Held-out loss", at.map("{:.3f}".format))
    equal = (
        equal.reindex(order)[["Held-out loss", *texts]].fillna("–").rename_axis(index="Method", columns=None)
    )
    found[f"{stem}-equal"] = (
        f"{title}: drift at the lowest loss that both reached, against {reference}",
        equal,
    )
    each = ratios[~ratios.operating.astype(bool) & loss & (ratios.text == OVER)]
    each = each.assign(column=[_point(row) + f" (loss {row.loss:.3f})" for row in each.itertuples()])
    wide = each.pivot(index="row", columns="column", values="told").reindex(
        index=order, columns=each.column.unique()
    )
    caption = f"{title}: drift over {OVER} at equal loss, against {reference} at each of its rates"
    found[f"{stem}-rates"] = caption, wide.fillna("–").rename_axis(index="Method", columns=None)
    below = numbers[numbers.metric == "share of losses below"].set_index("method").rename_axis("Method")
    counts = ["everywhere", "somewhere", "nowhere", "no common losses"]
    shown = below[counts].astype(int).add_prefix("Seeds: ")
    shown.insert(0, "Share of common losses, %", (100 * below.estimate).round(1))
    found[f"{stem}-below"] = f"{title}: where a method's frontier lies below that of {reference}", shown
    return found


def _best(settings: Any, numbers: pd.DataFrame) -> pd.DataFrame:
    """Each method at the rate with the lowest mean held-out loss."""
    point = ["method", "lr", "steps"]
    losses = numbers[numbers.metric == "held-out loss"]
    best = losses[losses.best].set_index(point)
    found = pd.DataFrame(
        {"Rate": best.index.get_level_values("lr"), "Held-out loss": best.estimate.map("{:.3f}".format)}
    )
    edges = (min(settings.rates), max(settings.rates))
    found["Rate"] = [f"{rate:g}, at the edge" if rate in edges else f"{rate:g}" for rate in found["Rate"]]
    scores = numbers[numbers.metric == "score"].set_index(point)
    found["Likelihood, %"] = scores.estimate.reindex(best.index).round(1)
    drifts = numbers[numbers.metric == "geometric drift"]
    for text in drifts.text.unique():
        kl = drifts[drifts.text == text].set_index(point).estimate.reindex(best.index)
        found[f"KL, {text}, 1/1000"] = (1000 * kl).round(2)
    drops = numbers[numbers.metric == "likelihood drop"].set_index(point).reindex(best.index)
    if len(drops) and drops.estimate.notna().any():
        found["Drop elsewhere, pp"] = [
            interval(row.estimate, row.low, row.high) for row in drops.itertuples()
        ]
    return found.reset_index(["lr", "steps"], drop=True).rename_axis("Method")


def _told(row: Any) -> str:
    if row.state == "reached":
        return interval(row.estimate, row.low, row.high, 2)
    return (
        f"≥ {row.estimate:.3g} (not reached)"
        if row.state == "not reached"
        else f"≤ {row.estimate:.3g} (learned more)"
    )


def _point(row: Any) -> str:
    return f"{row.lr:g}" + ("" if np.isinf(row.steps) else f", {row.steps:.0f} steps")


def domain_figures(
    study: Study, settings: Any, numbers: pd.DataFrame, stem: str, title: str
) -> dict[str, tuple]:
    """Return a domain's figures by file name: drift against loss by text, against likelihood, and what others lose.

    One set for the plain LoRAs, the reference's variants and the rivals; points that learned nothing are left out: one
    method's highest rates would press all others into a corner.
    """
    from hiplora.study.protocols.frontier import kind_of

    point = ["method", "lr", "steps"]
    losses = numbers[numbers.metric == "held-out loss"]
    losses = losses[losses.learned].set_index(point)[["estimate"]].rename(columns={"estimate": "loss"})
    rows = numbers.set_index(point).drop(columns="loss", errors="ignore").join(losses, how="inner")
    score = rows[rows.metric == "score"]["estimate"].rename("likelihood")
    rows = rows.drop(columns="likelihood", errors="ignore").join(score).reset_index()
    steps = ["" if np.isinf(n) else f", {n:.0f} steps" for n in rows.steps]
    rows = rows.assign(line=rows.method + steps).sort_values("lr", kind="stable")
    kinds = {
        study.row(name).title: kind_of(study, settings, name)
        for names in settings.domains.values()
        for name in names
    }
    reference = study.row(settings.reference).title
    found = {}
    for kind, (group, told) in GROUPS.items():
        shown = rows[(rows.method.map(kinds) == kind) | (rows.method == reference)]
        if set(shown.method) <= {reference}:
            continue
        caption, name = f"{title}: {reference} {told}", f"{stem}-{group}"
        drift, drop = shown[shown.metric == "geometric drift"], shown[shown.metric == "likelihood drop"]
        look = {"y": "estimate", "line": "line", "ylabel": "KL from the base, nats a token", "logy": True}
        if not drift.empty:
            figure = plots.facets(
                drift, "text", plots.lines, x="loss", xlabel="held-out loss, nats a token", **look
            )
            found[name] = f"{caption}, drift against loss", figure
            over = drift[(drift.text == OVER) & drift.likelihood.notna()]
            if not over.empty:
                figure = plots.lines(over, "likelihood", xlabel="likelihood on the own task (%)", **look)
                found[f"{name}-likelihood"] = f"{caption}, drift over {OVER} against likelihood", figure
        if not drop.empty:
            labels = {"xlabel": "held-out loss, nats a token", "ylabel": "fall of other likelihoods (pp)"}
            found[f"{name}-drop"] = (
                f"{caption}, what other tasks lose",
                plots.lines(drop, "loss", "estimate", "line", **labels),
            )
    return found
