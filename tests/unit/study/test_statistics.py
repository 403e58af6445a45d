"""Intervals over items and seeds."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from hiplora.study.statistics import (
    differences,
    drift,
    geometric,
    hierarchical,
    ratios,
    replicates,
    student,
    summary,
)


def records(values, task="gsm8k"):
    """Tidy rows of values[method][seed] = items."""
    return pd.DataFrame(
        [
            {"method": method, "seed": seed, "task": task, "item": item, "value": value}
            for method, seeds in values.items()
            for seed, items in enumerate(seeds)
            for item, value in enumerate(items)
        ]
    )


RANDOM = np.random.default_rng(0).uniform(0, 100, size=(2, 3, 40))
VALUES = {"a": RANDOM[0], "b": RANDOM[1]}
BY = ["method", "seed"]


def test_the_first_column_is_the_mean_and_the_interval_that_of_the_mean_over_the_seeds():
    found = summary(replicates(records(VALUES), BY))
    items = RANDOM[0].mean(axis=0)
    expected = stats.bootstrap([items], np.mean, method="percentile", n_resamples=20_000, rng=1)
    assert found.estimate["a"] == pytest.approx(RANDOM[0].mean())
    assert (found.low["a"], found.high["a"]) == pytest.approx(expected.confidence_interval, abs=0.4)
    assert (found.sd["a"], found.seeds["a"]) == (pytest.approx(RANDOM[0].mean(axis=1).std(ddof=1)), 3)


def test_methods_share_their_draws_so_that_constant_differences_have_no_width():
    draws = replicates(records({"a": VALUES["a"], "b": VALUES["a"] + 5, "c": VALUES["a"]}), BY)
    found = summary(differences(draws))
    assert list(found.index) == [("b", "a"), ("c", "a"), ("c", "b")]
    assert found[["estimate", "low", "high"]].to_numpy() == pytest.approx(np.repeat([[5], [0], [-5]], 3, axis=1))
    assert found.sd.to_numpy() == pytest.approx(0)
    assert list(summary(differences(draws, first=True)).index) == [("b", "a"), ("c", "a")]


def test_rows_of_other_items_have_draws_of_their_own():
    rows = pd.concat([records({"a": [[0.0, 100.0]]}), records({"b": [[0.0, 100.0, 50.0]]})])
    found = replicates(rows, BY)
    assert found[0].tolist() == [50, 50]
    assert set(np.unique(found.loc["a"].to_numpy())) == {0, 50, 100}


@pytest.mark.parametrize("low", [1.0, -20.0])  # a denominator that is positive in all replicates, and one that is not
def test_the_interval_of_a_ratio_is_fiellers(low):
    there, here = np.random.default_rng(1).uniform(low, 30, size=(2, 40))
    draws = replicates(records({"a": [there], "b": [here]}), BY)
    found = ratios(draws).loc[("b", "a", 0)]
    assert found.estimate == pytest.approx(np.mean(here) / np.mean(there))
    x, y = draws.to_numpy()[1, 1:], draws.to_numpy()[0, 1:]
    for bound, side in ((found.low, -1), (found.high, 1)):
        assert np.mean(side * (x - bound * y) >= 0) == pytest.approx(0.025, abs=0.005)


def test_a_ratio_whose_denominator_may_be_none_is_open_and_one_over_nothing_infinite():
    draws = replicates(records({"a": [[-3.0, 3.5]], "b": [[1.0, 1.0]], "c": [[0.0, 0.0]]}), BY)
    found = ratios(draws)
    assert np.isinf(found.high[("b", "a", 0)])
    assert found.estimate[("c", "b", 0)] == 0
    nothing = ratios(draws.iloc[::-1])
    assert np.isinf(nothing.estimate[("b", "c", 0)])
    assert np.isnan(nothing.low[("b", "c", 0)])


def test_the_interval_over_seeds_is_students():
    values = pd.Series([1.0, 2.0, 4.0], pd.MultiIndex.from_product([["a"], range(3)], names=BY))
    expected = stats.ttest_1samp(values, 0).confidence_interval()
    found = student(values).loc["a"]
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert np.isnan(student(values.iloc[:1]).low["a"])
    logs = geometric(np.exp(values)).loc["a"]
    assert (np.log(logs.low), np.log(logs.high)) == pytest.approx((expected.low, expected.high))


def test_the_papers_interval_draws_seeds_and_then_items():
    found = hierarchical(records(VALUES), ["method"]).iloc[0]
    assert found.hierarchical_low < summary(replicates(records(VALUES), BY)).low["a"]
    assert found.hierarchical_high - found.hierarchical_low < 60


def test_drift_is_compared_run_by_run_with_an_interval_over_seeds():
    rows = [
        {"method": method, "seed": seed, "domain": domain, "task": "prose", "metric": "kl", "value": kl}
        for method, by_seed in {"a": [(1, 2), (1, 2)], "b": [(0.1, 0.4), (0.2, 0.3)]}.items()
        for seed, pair in enumerate(by_seed)
        for domain, kl in zip(("x", "y"), pair, strict=True)
    ]
    found = drift(pd.DataFrame(rows)).set_index(["metric", "method"])
    assert found.estimate[("drift", "a")] == 1.5
    ratio = found.loc[("drift ratio", "b")]
    assert ratio.estimate == pytest.approx((0.1 * 0.2 * 0.2 * 0.15) ** 0.25)
    assert ratio.low < ratio.estimate < ratio.high
    assert drift(pd.DataFrame(rows), shared=True).low.isna().all()
