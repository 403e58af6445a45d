"""The numbers are those of the golden values; see README.md."""

import pytest

from tests.golden.make import SECTIONS, check


@pytest.mark.parametrize(
    "section", [pytest.param(name, marks=pytest.mark.slow) if name == "pico" else name for name in SECTIONS]
)
def test_the_numbers_are_the_golden_ones(section):
    differences = check(section)
    assert not differences, "\n".join(differences[:40])
