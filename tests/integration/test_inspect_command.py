import json

import pytest

from hiplora.adapters import inspect_adapter
from tests.commands import quietly, run, succeed
from tests.unit.adapters.samples import ATTENTION


@pytest.fixture
def adapter(adapters):
    return adapters["one"]


def test_every_module_has_a_row_and_json_is_the_librarys_record(adapter, capsys):
    out = quietly(capsys, "inspect", adapter)
    assert all(f"layers.{layer}.self_attn.{module}" in out for layer in (0, 1) for module in ATTENTION)
    record = json.loads(succeed(capsys, "inspect", adapter, "--rank", 8, "--json"))
    assert record == inspect_adapter(str(adapter), rank=8)


def test_of_many_modules_the_largest_updates_are_printed(adapter, capsys, monkeypatch):
    monkeypatch.setattr("hiplora.cli.inspect.MOST_ROWS", 3)
    out = succeed(capsys, "inspect", adapter)
    modules = inspect_adapter(str(adapter))["modules"]
    largest = {row["module"] for row in sorted(modules, key=lambda row: -row["norm"])[:3]}
    assert {row["module"] for row in modules if f"{row['module']} " in out} == largest
    assert f"the 3 largest updates of {len(modules)}" in " ".join(out.split())  # a long title is wrapped


def test_html_writes_a_page_that_asks_for_nothing_and_keeps_one_that_exists(adapter, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert str(page) in succeed(capsys, "inspect", adapter, "--html", page)
    text = page.read_text()
    assert "self_attn.q_proj" in text
    assert "data:image" in text
    assert not any(loader in text for loader in ('src="http', 'href="http', "url(http", "@import"))
    page.write_text("mine")
    code, _, err = run(capsys, "inspect", adapter, "--html", page)
    assert (code, "--overwrite" in err, page.read_text()) == (2, True, "mine")
    succeed(capsys, "inspect", adapter, "--html", page, "--overwrite")


def test_rounding_is_no_change_of_a_singular_value(adapters, tmp_path, capsys):
    succeed(capsys, "inspect", adapters["proj"], "--html", tmp_path / "page.html")
    assert "data:image" not in (tmp_path / "page.html").read_text()
