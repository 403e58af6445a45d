import pytest

from hiplora.study.demo_results import mean_drift, share, survival


def test_survival_counts_only_what_worked_alone():
    alone = {"a": {"preferred": [True, True, False]}, "b": {"preferred": [True, True, True]}}
    after = {"a": {"preferred": [True, False, True]}, "b": {"preferred": [False, False, True]}}
    assert survival(alone, after, "preferred") == pytest.approx(2 / 5)


def test_nothing_can_survive_that_never_worked():
    assert survival({"a": {"exact": [False]}}, {"a": {"exact": [True]}}, "exact") is None


def test_drift_is_averaged_text_by_text():
    first = {
        "prose": {"kl": 0.1, "perplexity_ratio": 2.0, "tokens": 9},
        "code": {"kl": 1.0, "perplexity_ratio": 1.0, "tokens": 5},
    }
    second = {
        "prose": {"kl": 0.3, "perplexity_ratio": 0.5, "tokens": 9},
        "code": {"kl": 2.0, "perplexity_ratio": 4.0, "tokens": 5},
    }
    found = mean_drift([first, second])
    assert found["prose"] == {"kl": pytest.approx(0.2), "perplexity_ratio": pytest.approx(1.0), "tokens": 9}
    assert found["code"] == {"kl": pytest.approx(1.5), "perplexity_ratio": pytest.approx(2.0), "tokens": 5}


def test_a_share_is_between_nothing_and_all():
    assert (share([True, False]), share([True]), share([False])) == (0.5, 1.0, 0.0)
