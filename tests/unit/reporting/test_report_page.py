import re

import pytest

from hiplora.errors import DataError
from hiplora.reporting.page import (
    flatten,
    render_html,
    render_inspection_html,
    save_figures,
    save_report,
    settings_table,
)
from tests.unit.reporting import report_samples as samples
from tests.unit.reporting.page_checks import Tags, assert_asks_for_nothing, assert_well_formed


def small(make=samples.demo_results, **changes):
    raw = make(**changes)
    for name in raw["methods"]:
        raw["methods"][name]["allocation"] = samples.allocation(name, 2, 8)
    return raw


@pytest.fixture(scope="module")
def page():
    return render_html(small())


def test_the_page_is_well_formed_and_its_ids_are_unique(page):
    assert_well_formed(page)


def test_the_page_can_ask_for_nothing(page):
    assert_asks_for_nothing(page)


def test_the_verdict_and_its_numbers_stand_on_the_page(page):
    text = re.sub(r"<[^>]+>", "", page).replace("\u00a0", " ")
    assert "Added together, HiP-LoRA&#39;s adapters kept 84 % of their edits, LoRA&#39;s 29 %." in text
    for heading in (
        "What survives the merge",
        "What was learned",
        "What changed elsewhere",
        "By module type",
    ):
        assert heading in text
    assert "3.10 × 10⁻⁵" in text, "the export check"
    assert "method.k" in text, "the recipe"
    assert "libraries.torch" in text, "the provenance"


def test_the_same_result_gives_the_same_page(page):
    assert render_html(small()) == page


def test_what_users_typed_is_text_and_never_markup():
    raw = small(
        samples.compare_results, title="<script>alert(1)</script>", notes=["<img src=x>"], model="a&b<i>"
    )
    raw["methods"]["<b>bold</b>"] = raw["methods"].pop("LoRA")
    raw["provenance"]["<u>"] = "</style><script>"
    raw["data"]["source"] = "\"'><svg onload=x>"
    tags = Tags(render_html(raw))
    assert {tag for tag, _ in tags.tags}.isdisjoint({"script", "img", "b", "u"})
    assert not any("onload" in attrs for _, attrs in tags.tags)
    assert tags.wrong == []


def test_an_empty_result_is_a_page_that_says_so():
    page = render_html({"schema": 1, "kind": "compare"})
    assert "Nothing was measured." in page
    assert "h-numbers" not in page
    assert Tags(page).wrong == []


def test_everything_at_once_still_renders():
    tags = Tags(render_html(samples.stress_results()))
    assert tags.wrong == []
    assert len(tags.ids) == len(set(tags.ids))


@pytest.mark.parametrize("key", ["data", "settings", "provenance", "methods", "edits", "notes"])
def test_each_section_may_be_missing(key):
    raw = small()
    for method in raw["methods"].values():
        method["allocation"] = method["allocation"][:1]
    del raw[key]
    assert Tags(render_html(raw)).wrong == []


def test_a_result_of_another_schema_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(DataError, match="schema 7"):
        save_report({"schema": 7, "kind": "compare"}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_saved_report_is_the_page_and_a_file_for_each_plate(tmp_path):
    path = save_report(small(), tmp_path / "out")
    assert path == tmp_path / "out" / "report.html"
    assert path.read_text(encoding="utf-8") == render_html(small())
    names = {file.name for file in (tmp_path / "out").rglob("*") if file.is_file()}
    plates = ("edits", "merge-drift", "loss", "drift", "spectrum", "energy", "types", "overview")
    assert names == {"report.html", *(f"{name}.svg" for name in plates)}


def test_figures_are_saved_in_the_formats_asked_for(tmp_path):
    raw = {"schema": 1, "kind": "compare", "methods": {"LoRA": {"heldout_loss_after": 1.0}}}
    paths = save_figures(raw, tmp_path, ("svg", "png"))
    assert {path.name for path in paths} == {"loss.svg", "loss.png"}


def test_an_inspection_renders_with_every_module():
    raw = samples.inspection(modules=samples.allocation("HiP-LoRA", 2, 8), method="HiP-LoRA")
    page = render_inspection_html(raw)
    assert Tags(page).wrong == []
    assert "model.layers.1.self_attn.o_proj" in page
    assert "its three curves agree" in page
    assert "its three curves agree" not in render_inspection_html(samples.inspection(modules=raw["modules"]))
    assert Tags(render_inspection_html({"schema": 1, "kind": "inspection"})).wrong == []


def test_settings_show_where_the_methods_differ():
    table = settings_table(
        {"LoRA": {"lr": 1, "k": None}, "HiP-LoRA": {"lr": 1, "k": 32}, "seed": 42}, ["LoRA", "HiP-LoRA"]
    )
    assert table["columns"] == ["LoRA", "HiP-LoRA"]
    assert ("seed", ["42", "42"], False) in table["rows"]
    assert ("lr", ["1", "1"], False) in table["rows"]
    assert ("k", ["—", "32"], True) in table["rows"]
    assert settings_table({"lr": 1}, ["LoRA"]) == {"columns": ["value"], "rows": [("lr", ["1"], False)]}
    assert settings_table({}, ["LoRA"])["rows"] == []


def test_nested_settings_flatten_to_dotted_names():
    nested = {"train": {"lr": 0.1, "seeds": [1, 2]}, "empty": {}, "none": None}
    assert flatten(nested) == [("train.lr", "0.1"), ("train.seeds", "1, 2"), ("empty", "none"), ("none", "—")]
