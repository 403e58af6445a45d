"""Intervals of a study's numbers: over the items of its tasks, and over its training seeds.

Replicates are a wide table: a row a score, column 0 its value, the further ones its value in each of 10,000 bootstrap
replicates. In a replicate a task's items are drawn with replacement, the same for all rows, so that differences between
methods stay paired; whatever pandas computes from the rows has its interval in `summary`.
"""

import math
import zlib
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hiplora.metrics.bootstrap import paired_bootstrap, resampled_means

REPLICATES = 10_000
FAR = 1e6  # beyond this a side of a ratio's interval counts as open


def replicates(records: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Return the mean over the items of each task with its replicates, a row for each value of `by`.

    `records` have the columns `by`, task, item and value; an item that comes twice counts with its mean. Rows that were
    scored on other items of a task than most (another number of them) have draws of their own.
    """
    parts = []
    for task, rows in records.groupby("task", sort=False):
        wide = rows.pivot_table(index="item", columns=list(by), values="value", sort=False)
        kept = wide.notna().T.apply(lambda row: row.to_numpy().tobytes(), axis=1)
        for _, columns in kept.groupby(kept, sort=False):
            items = wide[columns.index].dropna().sort_index()
            seed = [0, zlib.crc32(str(task).encode()), len(items)]
            means = resampled_means(items.to_numpy(), REPLICATES, seed)
            parts.append(pd.DataFrame(means.T, index=items.columns))
    if not parts:
        return pd.DataFrame(np.zeros((0, REPLICATES + 1)), pd.MultiIndex.from_tuples([], names=by))
    return pd.concat(parts)


def averaged(draws: pd.DataFrame, over: Sequence[str]) -> pd.DataFrame:
    """Return the means of replicates over levels of their index."""
    kept = [name for name in draws.index.names if name not in over]
    return draws.groupby(level=kept, sort=False).mean()


def summary(draws: pd.DataFrame, over: str = "seed") -> pd.DataFrame:
    """Return estimate, low and high (95 %, over items) of the means over the seeds, their sd over seeds and number."""
    kept = [name for name in draws.index.names if name != over]
    means = averaged(draws, [over])
    low, high = np.quantile(means.to_numpy()[:, 1:], (0.025, 0.975), axis=1) if len(means) else ((), ())
    seeds = draws[0].groupby(level=kept, sort=False)
    found = {"estimate": means[0], "low": low, "high": high, "sd": seeds.std(), "seeds": seeds.size()}
    return pd.DataFrame(found, index=means.index)


def with_spread(found: pd.DataFrame, seeds: pd.DataFrame) -> pd.DataFrame:
    """Return summaries with the spread of each seed's own values, where seeds were not scored on equal items."""
    groups = seeds[0].groupby(level=found.index.names, sort=False)
    return found.assign(sd=groups.std(), seeds=groups.size())


def differences(draws: pd.DataFrame, first: bool = False, level: str = "method") -> pd.DataFrame:
    """Return the paired differences of each method's replicates to every one before it, or to the first alone."""
    names = list(draws.index.unique(level))
    parts = {
        (here, there): draws.xs(here, level=level) - draws.xs(there, level=level)
        for place, here in enumerate(names)
        for there in names[: 1 if first and place else place]
    }
    if not parts:
        return draws.iloc[:0].assign(minus="").set_index("minus", append=True)
    found = pd.concat(parts, names=[level, "minus"])
    return found[found[0].notna()]


def ratios(draws: pd.DataFrame, level: str = "method") -> pd.DataFrame:
    """Return the ratios of each method to every one before it, index as of `differences`, `minus` called `over`.

    Fieller's interval, of the ratios r at which here − r·there may be 0, stays right where the denominator's replicates
    reach 0: a side of it may be open then (inf). Where the denominator itself is not positive, the ratio is inf.
    """
    pairs = differences(draws, level=level).index
    here = pairs.droplevel("minus").reorder_levels(draws.index.names)
    there = pairs.droplevel(level).rename(level, level="minus").reorder_levels(draws.index.names)
    sides = zip(draws.reindex(here).to_numpy(), draws.reindex(there).to_numpy(), strict=True)
    found = [_ratio(one, other) for one, other in sides]
    index = pairs.rename("over", level="minus")
    return pd.DataFrame(found, index, columns=["estimate", "low", "high"])


def _ratio(here: NDArray[np.float64], there: NDArray[np.float64]) -> tuple[float, float, float]:
    if not there[0] > 0:
        return math.inf, math.nan, math.nan
    if (there > 0).all():
        low, high = np.quantile(here[1:] / there[1:], (0.025, 0.975))
        return here[0] / there[0], low, high
    return here[0] / there[0], _edge(here, there, -1), _edge(here, there, 1)


def _edge(here: NDArray[np.float64], there: NDArray[np.float64], side: int) -> float:
    """The last ratio on a side of the estimate that 2.5 % of the replicates still allow."""

    def allowed(r: float) -> bool:
        return bool(np.mean(side * (here[1:] - r * there[1:]) >= 0) >= 0.025)

    inside = here[0] / there[0]
    outside = inside + side * max(1.0, abs(inside))
    while allowed(outside):
        inside, outside = outside, outside + 2 * (outside - inside)
        if abs(outside) > FAR:
            return side * math.inf
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if allowed(middle) else (inside, middle)
    return inside


def student(values: pd.Series, over: str = "seed") -> pd.DataFrame:
    """Return the means of values over a level of their index with Student's 95 % interval; none of a single value."""
    from scipy import stats

    groups = values.groupby(level=[name for name in values.index.names if name != over], sort=False)
    found = pd.DataFrame({"estimate": groups.mean(), "sd": groups.std(), "seeds": groups.size()})
    margin = stats.t.ppf(0.975, found.seeds - 1) * found.sd / np.sqrt(found.seeds)
    return found.assign(low=found.estimate - margin, high=found.estimate + margin)


def geometric(values: pd.Series, over: str = "seed") -> pd.DataFrame:
    """Return the geometric means of values over a level with Student's interval of their logarithms."""
    found = student(np.log(values), over)
    return np.exp(found[["estimate", "low", "high"]]).assign(seeds=found.seeds)


def hierarchical(records: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Return the paper's interval of the means for each value of `by`: seeds are drawn, then items within each seed."""
    found = {}
    for label, rows in records.groupby(list(by), sort=False):
        seeds = [one.to_numpy() for _, one in rows.groupby("seed", sort=False)["value"]]
        interval = paired_bootstrap({"": seeds}).mean[""]
        found[label] = (interval.low, interval.high)
    columns = ["hierarchical_low", "hierarchical_high"]
    index = pd.MultiIndex.from_tuples(found, names=by)
    return pd.DataFrame(list(found.values()), index, columns)


def drift(records: pd.DataFrame, by: Sequence[str] = (), shared: bool = False) -> pd.DataFrame:
    """Return each method's mean drift by text, and its ratio to every method before it, as measurements.

    Ratios are geometric means over paired runs, with Student's interval over the seeds; without one where runs of
    different seeds are of `shared` adapters.
    """
    kl = records[records.metric == "kl"].rename(columns={"task": "text"})
    if kl.empty:
        return pd.DataFrame(columns=["metric", *by, "method", "text", "estimate"])
    pairing = [name for name in ("domain", "merge") if name in kl]
    values = kl.set_index([*by, "method", "text", "seed", *pairing])["value"]
    seeds = values.groupby(level=[*by, "method", "text", "seed"], sort=False).mean()
    means = student(seeds)[["estimate", "sd", "seeds"]].assign(low=np.nan, high=np.nan)
    logs = np.log(values.where(values > 0)).to_frame(0)
    apart = differences(logs).rename_axis(index={"minus": "over"})[0]
    levels = [name for name in apart.index.names if name not in pairing]
    over = geometric(np.exp(apart.groupby(level=levels, sort=False).mean(numeric_only=True)))
    if shared:
        means["sd"] = over["low"] = over["high"] = np.nan
    told = means.reset_index().assign(metric="drift", unit="nats/token")
    return pd.concat([told, over.reset_index().assign(metric="drift ratio", unit="ratio")])
