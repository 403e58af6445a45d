"""Intervals over items and seeds."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from hiplora.study.statistics import differences, drift, geometric, hierarchical, replicates, student, summary

RANDOM = np.random.default_rng(0).uniform(0, 100, size=(2, 3, 40))
BY = ["method", "seed"]
INTERVAL = ["estimate", "low", "high"]


def records(**values):
    """Tidy rows of values[method][seed] = items."""
    rows = [
        (method, seed, "gsm8k", item, value)
        for method, seeds in values.items()
        for seed, items in enumerate(seeds)
        for item, value in enumerate(items)
    ]
    return pd.DataFrame(rows, columns=["method", "seed", "task", "item", "value"])


def test_the_first_column_is_the_mean_and_the_interval_that_of_the_mean_over_the_seeds():
    draws = replicates(records(a=RANDOM[0], b=RANDOM[1]), BY)
    interval = summary(draws).loc["a"]
    items = RANDOM[0].mean(axis=0)
    expected = stats.bootstrap([items], np.mean, method="percentile", n_resamples=20_000, rng=1)
    assert interval.estimate == pytest.approx(RANDOM[0].mean())
    assert (interval.low, interval.high) == pytest.approx(expected.confidence_interval, abs=0.4)
    assert (interval.sd, interval.seeds) == (pytest.approx(RANDOM[0].mean(axis=1).std(ddof=1)), 3)
    papers = hierarchical(records(a=RANDOM[0]), ["method"]).iloc[0]  # seeds are drawn too
    assert papers.low < interval.low
    assert papers.high - interval.high < 60


def test_methods_share_their_draws_so_that_constant_differences_have_no_width():
    draws = replicates(records(a=RANDOM[0], b=RANDOM[0] + 5, c=RANDOM[0]), BY)
    intervals = summary(differences(draws))
    assert list(intervals.index) == [("b", "a"), ("c", "a"), ("c", "b")]
    assert intervals[INTERVAL].to_numpy() == pytest.approx(np.repeat([[5], [0], [-5]], 3, axis=1))
    assert intervals.sd.to_numpy() == pytest.approx(0)
    assert list(summary(differences(draws, first=True)).index) == [("b", "a"), ("c", "a")]


def test_rows_of_other_items_have_draws_of_their_own():
    draws = replicates(records(a=[[0.0, 100.0]], b=[[0.0, 100.0, 50.0]]), BY)
    assert draws[0].tolist() == [50, 50]
    assert set(np.unique(draws.loc["a"].to_numpy())) == {0, 50, 100}


def test_a_ratio_has_an_interval_only_where_its_denominator_is_positive_for_sure():
    draws = replicates(records(a=[[-3.0, 3.5]], b=[[1.0, 3.0]], c=[[0.0, 0.0]], d=[[2.0, 6.0]]), BY)
    ratios = summary(differences(draws, ratio=True))
    assert ratios.loc[("d", "b"), INTERVAL].tolist() == pytest.approx([2, 2, 2])
    assert ratios.estimate[("b", "a")] == pytest.approx(8)
    assert np.isnan(ratios.low[("b", "a")])
    assert np.isnan(ratios.estimate[("d", "c")])


def test_the_interval_over_seeds_is_students_and_taken_from_five_seeds_on():
    means = pd.Series([1.0, 2.0, 4.0], pd.MultiIndex.from_product([["a"], range(3)], names=BY))
    expected = stats.ttest_1samp(means, 0).confidence_interval()
    assert student(means).loc["a", ["low", "high"]].tolist() == pytest.approx(list(expected))
    assert np.isnan(student(means.iloc[:1]).low["a"])
    logs = np.log(geometric(np.exp(means)).loc["a", ["low", "high"]].astype(float))
    assert logs.tolist() == pytest.approx(list(expected))
    values = RANDOM.reshape(6, 40) + 100 * np.arange(6)[:, None]
    for seeds in (4, 6):
        interval = summary(replicates(records(a=values[:seeds]), BY)).loc["a"]
        expected = stats.ttest_1samp(values[:seeds].mean(1), 0).confidence_interval()
        assert (interval.high == pytest.approx(expected.high)) == (seeds == 6)


def test_drift_is_compared_run_by_run_with_an_interval_over_seeds():
    kl = {("a", 0): (1, 2), ("a", 1): (1, 2), ("b", 0): (0.1, 0.4), ("b", 1): (0.2, 0.3)}
    rows = [
        (method, seed, domain, v) for (method, seed), pair in kl.items() for domain, v in zip("xy", pair, strict=True)
    ]
    rows = pd.DataFrame(rows, columns=["method", "seed", "domain", "value"]).assign(task="prose", metric="kl")
    drifts = drift(rows).set_index(["metric", "method"])
    assert drifts.estimate[("drift", "a")] == 1.5
    ratio = drifts.loc[("drift ratio", "b")]
    assert ratio.estimate == pytest.approx((0.1 * 0.2 * 0.2 * 0.15) ** 0.25)
    assert ratio.low < ratio.estimate < ratio.high
    assert drift(rows, shared=True).low.isna().all()
    losses = rows.assign(metric="perplexity_ratio", value=[1.0, np.e, np.e**2, np.e**5] * 2)
    growth = drift(pd.concat([rows, losses])).set_index(["metric", "method"]).estimate["loss growth"]
    assert growth.tolist() == pytest.approx([2.0, 2.0])  # the mean of what each run's loss grew by
