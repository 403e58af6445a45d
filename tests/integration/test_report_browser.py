"""The report in a real browser: no error, no request, nothing cut off and no words on top of each other."""

import importlib.util
import sys
from pathlib import Path

import pytest

from hiplora.reporting.merge_page import render_merge_html
from hiplora.reporting.page import render_html, render_inspection_html
from tests.unit.reporting import merge_samples
from tests.unit.reporting import report_samples as samples

_SPEC = importlib.util.spec_from_file_location("browser", Path(__file__).parents[2] / "tools" / "browser.py")
assert _SPEC is not None
assert _SPEC.loader is not None
browser_tool = importlib.util.module_from_spec(_SPEC)
sys.modules["browser"] = browser_tool
_SPEC.loader.exec_module(browser_tool)

BINARY = browser_tool.find_browser()
pytestmark = pytest.mark.skipif(BINARY is None, reason="no Chromium or Chrome on PATH to open a page with")

PAGES = {
    "compare": lambda: render_html(samples.compare_results()),
    "demo": lambda: render_html(samples.demo_results()),
    "stress": lambda: render_html(samples.stress_results()),
    "empty": lambda: render_html({"schema": 1, "kind": "compare"}),
    "inspection": lambda: render_inspection_html(samples.inspection()),
    "merge": lambda: render_merge_html(merge_samples.merge_report(evaluation=merge_samples.evaluation())),
    "merge of two": lambda: render_merge_html(merge_samples.merge_report(("medicine", "law"), layers=80)),
    "merge of eight": lambda: render_merge_html(merge_samples.merge_report(tuple("abcdefgh"), layers=2)),
    "merge under stress": lambda: render_merge_html(merge_samples.stress_report()),
}
# Pairs of words in one picture whose boxes share more than a pixel in both directions.
OVERLAPS = """
[...document.querySelectorAll('svg.plot')].flatMap(svg => {
  const words = [...svg.querySelectorAll('text')].filter(t => t.textContent.trim())
    .map(t => [t.textContent, t.getBoundingClientRect()]);
  return words.flatMap(([one, a], i) => words.slice(i + 1)
    .filter(([_, b]) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
                     && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1)
    .map(([two, _]) => one + ' | ' + two));
})
"""
# Words that reach out of their picture.
CUT_OFF = """
[...document.querySelectorAll('svg.plot')].flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter(t => {
    const box = t.getBoundingClientRect();
    return box.left < frame.left - 1 || box.right > frame.right + 1
        || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
  }).map(t => t.textContent);
})
"""
SMALLEST = """
Math.min(...[...document.querySelectorAll('svg.plot text')].map(
  t => parseFloat(getComputedStyle(t).fontSize) * Math.hypot(t.getCTM().c, t.getCTM().d)), 99)
"""
SIDEWAYS = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def browser():
    with browser_tool.Browser(BINARY) as opened:
        yield opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


def write(folder, name, text):
    path = folder / f"{name}.html"
    path.write_text(text, encoding="utf-8")
    return path.as_uri()


@pytest.mark.parametrize("name", PAGES)
def test_the_page_logs_no_error_asks_for_nothing_and_fits(browser, folder, name):
    address = write(folder, name, PAGES[name]())
    for width, dark in ((1280, False), (1280, True), (390, False)):
        browser.view(width, dark=dark)
        visit = browser.open(address)
        assert visit.errors == []
        assert visit.requests[0] == address
        assert browser_tool.foreign(visit, address) == []
        assert browser.evaluate(SIDEWAYS) == 0, f"the page scrolls sideways at {width} px"
        assert browser.evaluate(OVERLAPS) == []
        assert browser.evaluate(CUT_OFF) == []
        assert browser.evaluate(SMALLEST) >= (11 if width > 1000 else 8)


def test_the_page_follows_the_reader_s_light_or_dark(browser, folder):
    address = write(folder, "themes", render_html(samples.stress_results()))
    ground = "getComputedStyle(document.body).backgroundColor"
    first = 'svg.plot path[style^="fill: var(--ccf5300"]'
    bar = f"getComputedStyle(document.querySelector('{first}')).fill"
    seen = {}
    for dark in (False, True):
        browser.view(1280, dark=dark)
        browser.open(address)
        seen[dark] = (browser.evaluate(ground), browser.evaluate(bar))
    assert seen[False] == ("rgb(255, 255, 255)", "rgb(207, 83, 0)")
    assert seen[True] == ("rgb(22, 26, 34)", "rgb(255, 143, 77)")


def test_paper_is_light_and_shows_what_was_folded_away(browser, folder):
    address = write(folder, "paper", render_html(samples.compare_results()))
    browser.view(1000, dark=True, media="print")
    browser.open(address)
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.evaluate("[...document.querySelectorAll('details table')].every(t => t.checkVisibility())")
    browser.view(1000)
    assert not browser.evaluate(
        "[...document.querySelectorAll('details table')].some(t => t.checkVisibility())"
    )


def test_a_page_that_misbehaves_is_caught(browser, folder):
    bad = "<!DOCTYPE html><script>console.error('oh no')</script><img src='http://127.0.0.1:9/x.png'><svg class=plot>"
    bad += "<text x='9' y='20'>one</text><text x='12' y='22'>two</text></svg><div style='width:9999px'>wide</div>"
    address = write(folder, "bad", bad)
    browser.view(1280)
    visit = browser.open(address)
    assert "oh no" in visit.errors
    assert browser_tool.foreign(visit, address) == ["http://127.0.0.1:9/x.png"]
    assert browser.evaluate(SIDEWAYS) > 0
    assert browser.evaluate(OVERLAPS) == ["one | two"]


def test_the_policy_of_the_page_blocks_what_a_stray_tag_would_fetch(browser, folder):
    page = render_html({"schema": 1, "kind": "compare"})
    stray = page.replace(
        "</body>", "<img src='http://127.0.0.1:9/x.png'><script>console.error('ran')</script></body>"
    )
    address = write(folder, "stray", stray)
    visit = browser.open(address)
    assert "ran" not in visit.errors
    assert any("Content Security Policy" in error for error in visit.errors)
