"""The report page in a real browser: its pictures are shown and nothing reaches out sideways."""

import html
import re
import shutil
import subprocess

import pandas as pd
import pytest

from hiplora.reporting import plots
from hiplora.reporting.html import Section, save_page

BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BINARY is None, reason="no Chromium or Chrome on PATH to open a page with"),
]
WIDE = pd.DataFrame([{f"column number {i}": 12345.678 for i in range(20)}])
SPECTRUM = pd.DataFrame({"type": list("abcd") * 3, "sigma": range(1, 13), "gain": range(2, 14)})
# The page's own policy allows no script, so a page around it measures it.
AROUND = """<iframe id="frame" width="{width}" height="900" srcdoc="{page}"></iframe><script>
onload = () => {{
  const page = document.getElementById("frame").contentDocument, root = page.documentElement;
  document.title = [root.scrollWidth - root.clientWidth, ...[...page.images].map(i => i.naturalWidth > 0)];
}}</script>"""


@pytest.mark.parametrize("width", [1200, 390])
def test_the_page_fits_the_window(tmp_path, width):
    spectrum = plots.facets(SPECTRUM, "type", plots.scatter, x="sigma", y="gain", logx=True, logy=True)
    cells = plots.heatmap(SPECTRUM[["sigma", "gain"]])
    section = Section("A section", "x" * 400, {"Wide": WIDE}, {"Spectrum": spectrum, "Cells": cells})
    name, about = "a-very-long-name-" * 10, {"path": "y" * 300}
    page = save_page(tmp_path / "report.html", name, [section], provenance=about)
    around = tmp_path / "around.html"
    around.write_text(AROUND.format(width=width, page=html.escape(page.read_text())))
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom")
    command = [BINARY, *flags, f"--user-data-dir={tmp_path / 'profile'}", around.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert re.search("<title>(.*?)</title>", shown)[1] == "0,true,true"
