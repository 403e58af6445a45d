"""Intervals of a study's numbers, one kind each: over the seeds from five on, else over the items of the tasks.

Replicates are a wide table: a row a score, column 0 its value, the further ones its value in each of 10,000 bootstrap
replicates. In a replicate a task's items are drawn with replacement, the same for all rows, so that differences between
methods stay paired; whatever pandas computes from the rows has its interval in `summary`.
"""

import zlib
from collections.abc import Sequence

import numpy as np
import pandas as pd

from hiplora.metrics.bootstrap import paired_bootstrap, resampled_means, student_margin

REPLICATES = 10_000
SEEDS = 5  # from so many on, intervals are Student's t over the seeds


def replicates(records: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Return the mean over the items of each task with its replicates, a row for each value of `by`.

    `records` have the columns `by`, task, item and value; an item that comes twice counts with its mean. Rows that were
    scored on other items of a task than most have draws of their own.
    """
    parts = []
    for task, rows in records.groupby("task", sort=False):
        wide = rows.pivot_table(index="item", columns=list(by), values="value", sort=False)
        scored = wide.notna().T.apply(lambda row: row.to_numpy().tobytes(), axis=1)  # which items a row has
        for _, columns in scored.groupby(scored, sort=False):
            items = wide[columns.index].dropna().sort_index()
            seed = [0, zlib.crc32(str(task).encode()), len(items)]
            means = resampled_means(items.to_numpy(), REPLICATES, seed)
            parts.append(pd.DataFrame(means.T, index=items.columns))
    return pd.concat(parts)


def averaged(draws: pd.DataFrame, over: Sequence[str]) -> pd.DataFrame:
    """Return the means of replicates over levels of their index."""
    levels = [name for name in draws.index.names if name not in over]
    return draws.groupby(level=levels, sort=False).mean()


def summary(draws: pd.DataFrame) -> pd.DataFrame:
    """Return estimate, low and high of the means over the seeds, their sd over the seeds, and how many these are."""
    summaries, means = student(draws[0]), averaged(draws, ["seed"]).to_numpy()[:, 1:]
    bounds = np.quantile(means, (0.025, 0.975), axis=1) if len(means) else ((), ())
    for side, values in zip(("low", "high"), bounds, strict=True):
        summaries[side] = summaries[side].where(summaries.seeds >= SEEDS, values)
    return summaries


def differences(draws: pd.DataFrame, first: bool = False, ratio: bool = False) -> pd.DataFrame:
    """Return the paired differences of each method's replicates to every one before it, or to the first alone.

    With `ratio` the quotients instead, NaN where the denominator is not positive, so that such rows have no interval.
    """
    names, parts = list(draws.index.unique("method")), {}
    for index, name in enumerate(names):
        for reference in names[: 1 if first and index else index]:
            own, others = (draws.xs(method, level="method") for method in (name, reference))
            own, others = own.align(others, "inner", axis=0)
            parts[name, reference] = own / others.where(others > 0) if ratio else (own - others).dropna(subset=0)
    if not parts:
        return draws.iloc[:0].assign(minus="").set_index("minus", append=True)
    return pd.concat(parts, names=["method", "minus"])


def student(values: pd.Series) -> pd.DataFrame:
    """Return the means of values over the seeds with Student's 95 % interval; of a single value there is none."""
    groups = values.groupby(level=[name for name in values.index.names if name != "seed"], sort=False)
    means = pd.DataFrame({"estimate": groups.mean(), "sd": groups.std(), "seeds": groups.size()})
    margin = student_margin(means.sd, means.seeds)
    return means.assign(low=means.estimate - margin, high=means.estimate + margin)


def geometric(values: pd.Series) -> pd.DataFrame:
    """Return the geometric means of values over the seeds with Student's interval of their logarithms."""
    logs = student(np.log(values))
    return np.exp(logs[["estimate", "low", "high"]]).assign(seeds=logs.seeds)


def hierarchical(records: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Return the means for each value of `by` with the paper's interval: seeds are drawn, then values within each."""

    def interval(rows: pd.DataFrame) -> pd.Series:
        seeds = [values.to_numpy() for _, values in rows.groupby("seed", sort=False)["value"]]
        mean = paired_bootstrap({"": seeds}).mean[""]
        return pd.Series({"estimate": rows["value"].mean(), "low": mean.low, "high": mean.high})

    return records.groupby(list(by), sort=False)[["seed", "value"]].apply(interval)


def opened(summaries: pd.DataFrame, counts: pd.Series) -> pd.DataFrame:
    """Return summaries of shares in % or pp, with the exact bound in place of an interval of no width.

    An interval has none where all items agree. The bound is Clopper and Pearson's: if none of n items showed something,
    a share up to 1 − 0.025^(1/n) of all items may.
    """
    margin = np.where(summaries.low == summaries.high, 100 * (1 - 0.025 ** (1 / counts)), 0.0)
    least = np.where(summaries.unit == "pp", -100, 0)
    return summaries.assign(
        low=np.maximum(summaries.low - margin, least), high=np.minimum(summaries.high + margin, 100)
    )


def drift(records: pd.DataFrame, by: Sequence[str] = (), shared: bool = False) -> pd.DataFrame:
    """Return each method's mean drift by text, its ratio to every method before it, and how much the text's loss grew.

    Ratios are geometric means over paired runs, with Student's interval over the seeds; without one where runs of
    different seeds are of `shared` adapters.
    """
    records = records.rename(columns={"task": "text"})
    kl, ratios = (records[records.metric == metric] for metric in ("kl", "perplexity_ratio"))
    if kl.empty:
        return pd.DataFrame(columns=["metric", *by, "method", "text", "estimate"])
    pairing = [name for name in ("domain", "merge", "order") if name in kl]
    values, losses = (rows.set_index([*by, "method", "text", "seed", *pairing])["value"] for rows in (kl, ratios))
    means = student(averaged(values, pairing)).assign(low=np.nan, high=np.nan)
    logs = differences(np.log(values.where(values > 0)).to_frame(0)).rename_axis(index={"minus": "over"})
    over = geometric(np.exp(averaged(logs, pairing)[0]))
    if shared:
        means["sd"] = over["low"] = over["high"] = np.nan
    growth = averaged(np.log(losses), ["seed", *pairing]).rename("estimate")
    return pd.concat(
        [
            means.reset_index().assign(metric="drift", unit="nats/token"),
            over.reset_index().assign(metric="drift ratio", unit="ratio"),
            growth.reset_index().assign(metric="loss growth", unit="nats/token"),
        ]
    )
