"""The report page in a real browser: no error, no request, and nothing that reaches out sideways."""

import importlib.util
import sys
from pathlib import Path

import pandas as pd
import pytest

from hiplora.reporting import Section, plots, save_page

_SPEC = importlib.util.spec_from_file_location("browser", Path(__file__).parents[2] / "tools" / "browser.py")
browser_tool = importlib.util.module_from_spec(_SPEC)
sys.modules["browser"] = browser_tool
_SPEC.loader.exec_module(browser_tool)

BINARY = browser_tool.find_browser()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BINARY is None, reason="no Chromium or Chrome on PATH to open a page with"),
]
WIDE = pd.DataFrame([{f"column number {i}": 12345.678 for i in range(20)}])
SPECTRUM = pd.DataFrame({"type": list("abcd") * 3, "sigma": range(1, 13), "gain": range(2, 14)})


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    spectrum = plots.facets(SPECTRUM, "type", plots.scatter, x="sigma", y="gain", logx=True, logy=True)
    bars = plots.bars(SPECTRUM, "gain", "type", xlabel="gain")
    section = Section("A section", "x" * 400, {"Wide": WIDE}, {"Spectrum": spectrum, "Bars": bars})
    path = tmp_path_factory.mktemp("page") / "report.html"
    return save_page(path, "a-very-long-name-" * 10, [section], provenance={"path": "y" * 300}).as_uri()


@pytest.mark.parametrize("width", [1200, 390])
def test_the_page_opens_clean_and_fits_the_window(page, width):
    with browser_tool.Browser(BINARY) as browser:
        browser.view(width)
        visit = browser.open(page)
        root = "document.documentElement"
        assert browser.evaluate(f"{root}.scrollWidth - {root}.clientWidth") == 0
        pictures = browser.evaluate("[...document.images].map(image => image.naturalWidth > 0)")
    assert pictures == [True, True]
    assert visit.errors == []
    assert [address for address in visit.requests if not address.startswith(("file:", "data:"))] == []
