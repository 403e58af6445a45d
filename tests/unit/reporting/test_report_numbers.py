import math

import pytest

from hiplora.reporting import numbers


@pytest.mark.parametrize("value", [None, float("nan"), "soon", True, [], {}])
def test_what_was_not_measured_is_none(value):
    assert numbers.number(value) is None


def test_infinity_is_a_measurement():
    assert numbers.number(math.inf) == math.inf
    assert numbers.significant(math.inf) == "∞"
    assert numbers.change(-math.inf) == "−∞"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "—"),
        (0, "0"),
        (0.0123456, "0.0123"),
        (1.5, "1.50"),
        (9.999, "10.0"),
        (1234.5, "1,234"),
        (-0.5, "−0.500"),
        (3.1e-5, "3.10\u00a0×\u00a010⁻⁵"),
        (9.9999e-5, "0.000100"),
        (2.5e9, "2.50\u00a0×\u00a010⁹"),
    ],
)
def test_significant_digits(value, text):
    assert numbers.significant(value) == text


@pytest.mark.parametrize(
    ("fraction", "text"),
    [
        (0, "0 %"),
        (1, "100 %"),
        (0.84375, "84 %"),
        (0.0123, "1.2 %"),
        (0.99999, "100 %"),
        (0.995, "100 %"),
        (-0.05, "−5 %"),
    ],
)
def test_percentages(fraction, text):
    assert numbers.percent(fraction) == text.replace(" ", "\u00a0")


@pytest.mark.parametrize(
    ("ratio", "text"), [(1.034, "+3.4 %"), (0.98, "−2.0 %"), (1, "±0 %"), (1.0021, "+0.21 %"), (3, "+200 %")]
)
def test_a_ratio_reads_as_a_signed_change(ratio, text):
    assert numbers.change(ratio) == text.replace(" ", "\u00a0")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3.14159, "3.14 s"),
        (59.96, "1 min 00 s"),
        (192, "3 min 12 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations(seconds, text):
    assert numbers.duration(seconds).replace("\u00a0", " ") == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (512, "512 B"), (1.61 * 2**30, "1.61 GiB"), (1023 * 2**20, "0.999 GiB"), (None, "—")],
)
def test_storage(size, text):
    assert numbers.storage(size).replace("\u00a0", " ") == text


def test_a_small_loss_is_not_printed_as_zero():
    assert numbers.fixed(0.00004) == "4.00\u00a0×\u00a010⁻⁵"
    assert numbers.fixed(0.0) == "0.000"


def test_means_leave_out_what_is_missing():
    assert numbers.mean([1.0, None, 3.0]) == 2.0
    assert numbers.mean([None]) is None
    assert numbers.geometric_mean([1.0, 4.0, None]) == pytest.approx(2.0)
    assert numbers.geometric_mean([1.0, math.inf]) == math.inf


def test_a_long_label_keeps_its_two_ends_within_the_limit():
    short = numbers.shorten("model.layers.17.self_attn.q_proj", 20)
    assert len(short) == 20
    assert short.startswith("model")
    assert short.endswith("attn.q_proj")
    assert numbers.shorten("q_proj", 20) == "q_proj"


def test_control_characters_and_line_breaks_never_reach_a_page():
    assert numbers.printable("a\x00b\x1b[1m\nc\u202ed") == "ab[1m cd"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.614, "0.61"), (-0.229, "−0.23"), (-0.004, "0.00"), (1, "1.00"), (None, "—"), (math.inf, "∞")],
)
def test_hundredths(value, text):
    assert numbers.hundredths(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12, "+0.12"), (-3.4, "−3.40"), (-0.004, "±0.00"), (1234.5, "+1,234.50"), (None, "—")],
)
def test_signed(value, text):
    assert numbers.signed(value) == text
