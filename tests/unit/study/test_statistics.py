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


def test_a_ratio_has_an_interval_only_where_its_denominator_is_positive_for_sure():
    draws = replicates(records({"a": [[-3.0, 3.5]], "b": [[1.0, 3.0]], "c": [[0.0, 0.0]], "d": [[2.0, 6.0]]}), BY)
    found = summary(differences(draws, ratio=True))
    assert found.loc[("d", "b"), ["estimate", "low", "high"]].tolist() == pytest.approx([2, 2, 2])
    assert found.estimate[("b", "a")] == pytest.approx(8)
    assert np.isnan(found.low[("b", "a")])
    assert np.isnan(found.estimate[("d", "c")])


def test_from_five_seeds_on_the_interval_is_over_the_seeds():
    values = RANDOM.reshape(6, 40) + 100 * np.arange(6)[:, None]
    for seeds in (4, 6):
        found = summary(replicates(records({"a": values[:seeds]}), BY)).loc["a"]
        expected = student(
            pd.Series(values[:seeds].mean(1), pd.MultiIndex.from_product([["a"], range(seeds)], names=BY))
        )
        assert (found.high == pytest.approx(expected.high["a"])) == (seeds == 6)


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
    assert found.low < summary(replicates(records(VALUES), BY)).low["a"]
    assert found.high - found.low < 60


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
