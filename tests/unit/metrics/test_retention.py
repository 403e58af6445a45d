import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiplora.errors import ConfigError, DataError
from hiplora.metrics import retain

few = settings(max_examples=50, deadline=None, derandomize=True, database=None)

BASE = {"mmlu": 60.0, "scienceqa": 70.0, "gsm8k": 40.0, "code": 30.0}
ADAPTED = {"mmlu": 50.0, "scienceqa": 73.0, "gsm8k": 90.0, "code": 25.0}


def test_retain_is_the_mean_drop_on_the_other_benchmarks():
    # ((60 − 50) + (70 − 73) + (30 − 25)) / 3 = (10 − 3 + 5) / 3: a gain is a negative drop, gsm8k is left out.
    assert retain(BASE, ADAPTED, "gsm8k") == pytest.approx(4.0)


def test_an_adapter_that_helps_elsewhere_has_a_negative_retain():
    assert retain({"a": 10.0, "b": 20.0}, {"a": 0.0, "b": 26.5}, "a") == pytest.approx(-6.5)


def test_the_domains_own_score_is_not_needed():
    others = {name: score for name, score in ADAPTED.items() if name != "gsm8k"}
    assert retain(BASE, others, "gsm8k") == retain(BASE, ADAPTED, "gsm8k")


@few
@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 100), min_size=2), st.floats(0, 100))
def test_nothing_changed_elsewhere_is_nothing_lost(base, own):
    domain = next(iter(base))
    assert retain(base, {**base, domain: own}, domain) == 0


@pytest.mark.parametrize(
    ("base", "adapted", "message"),
    [
        (BASE, {**ADAPTED, "extra": 1.0}, "base: benchmark 'extra' is missing, and adapted has it"),
        (BASE, {"mmlu": 1.0, "code": 1.0}, "adapted: benchmark 'scienceqa' is missing, and base has it"),
        (BASE, {**ADAPTED, "code": float("nan")}, r"adapted\['code'\] is nan; expected a finite number"),
        ({**BASE, "mmlu": float("inf")}, ADAPTED, r"base\['mmlu'\] is inf"),
        (BASE, {**ADAPTED, "code": -1.0}, r"adapted\['code'\] is -1.0; expected a score in per cent"),
        (BASE, {**ADAPTED, "code": "high"}, r"adapted\['code'\]: not an array of numbers"),
        ({"gsm8k": 1.0}, {"gsm8k": 1.0}, "has no benchmark but the domain 'gsm8k'"),
        ({}, ADAPTED, "base: is {}"),
    ],
)
def test_scores_that_cannot_be_compared_are_named(base, adapted, message):
    with pytest.raises(DataError, match=message):
        retain(base, adapted, "gsm8k")


def test_a_domain_that_is_no_benchmark_is_refused():
    with pytest.raises(
        ConfigError, match="domain 'humaneval' is not among the benchmarks; expected one of mmlu, "
    ):
        retain(BASE, ADAPTED, "humaneval")
