"""The numbers are those of the golden values; see README.md."""

import pytest

from tests.golden.make import SECTIONS, check


# pico's are checked in tests/integration/test_study_run.py.
@pytest.mark.parametrize("section", [name for name in SECTIONS if name != "pico"])
def test_the_numbers_are_the_golden_ones(section):
    differences = check(section)
    assert not differences, "\n".join(differences[:40])
