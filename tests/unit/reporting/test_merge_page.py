import json
import re
import xml.etree.ElementTree as ET

import pytest

from hiplora.errors import DataError
from hiplora.reporting._old_plots import heat
from hiplora.reporting._old_plots.broken import points
from hiplora.reporting.canvas import inline_svg
from hiplora.reporting.merge_page import merge_plates, render_merge_html, save_merge_html
from hiplora.reporting.merge_results import read_merge_report
from tests.unit.reporting import merge_samples as samples
from tests.unit.reporting.page_checks import Tags, assert_asks_for_nothing, assert_well_formed


def small(names=("medicine", "law", "code"), **changes):
    return samples.merge_report(names, layers=2, **changes)


def text_of(page):
    return re.sub(r"<[^>]+>", "", page).replace("\u00a0", " ")


@pytest.fixture(scope="module")
def page():
    return render_merge_html(small(evaluation=samples.evaluation()))


def test_the_page_is_well_formed_and_its_ids_are_unique(page):
    assert_well_formed(page)


def test_the_page_can_ask_for_nothing(page):
    assert_asks_for_nothing(page)


def test_the_same_report_gives_the_same_page_read_back_from_json(page):
    raw = json.loads(json.dumps(small(evaluation=samples.evaluation())))
    assert render_merge_html(raw) == page


def test_everything_that_was_measured_stands_on_the_page(page):
    text = text_of(page)
    parts = ["Merge of 3 adapters", "What the merge broke", "The most conflicting modules", "Pair by pair"]
    parts += ["Where the adapters meet", "What cancels", "Every module", "model.layers.1.mlp.down_proj"]
    parts += ["−15.1 … −7.3", "Scores are means over three seeds.", "rank_tolerance", "export.path"]
    for part in parts:
        assert part in text, part
    assert "export.modules" not in text


def test_without_an_evaluation_there_is_no_such_section(page):
    text = text_of(render_merge_html(small()))
    assert "What the merge broke" not in text
    assert "MergeFail" not in text
    assert "Before" not in text


@pytest.mark.parametrize("key", ["tasks", "merge_fail", "mean_drop", "notes"])
def test_each_part_of_an_evaluation_may_be_absent(key):
    evaluation = samples.evaluation()
    del evaluation[key]
    assert Tags(render_merge_html(small(evaluation=evaluation))).wrong == []


def test_names_are_text_and_never_markup():
    tags = Tags(render_merge_html(samples.stress_report()))
    assert {tag for tag, _ in tags.tags}.isdisjoint({"script", "b", "i"} - {"i"})
    assert [attrs for tag, attrs in tags.tags if tag == "i" and "style" not in attrs] == []
    assert tags.wrong == []


@pytest.mark.parametrize("names", [(), ("alone",), ("one", "two"), tuple("abcdefghijk")])
def test_any_number_of_adapters_makes_a_page(names):
    raw = small(names)
    assert Tags(render_merge_html(raw)).wrong == []
    found = [plate.name for plate in merge_plates(read_merge_report(raw))]
    assert ("pairs" in found) == (3 <= len(names) <= 8)
    assert ("where" in found) == (len(names) > 1)


def test_an_empty_report_is_a_page_that_says_so():
    page = render_merge_html({"schema": 1, "kind": "merge-report"})
    assert "nothing that it could conflict with" in page
    assert Tags(page).wrong == []


@pytest.mark.parametrize(
    "key", ["adapters", "modules", "most_conflicting", "pairs", "totals", "merge", "provenance"]
)
def test_each_section_may_be_missing(key):
    raw = small()
    del raw[key]
    assert Tags(render_merge_html(raw)).wrong == []


def test_what_is_no_merge_report_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(DataError, match="schema 7"):
        save_merge_html({"schema": 7}, tmp_path / "out" / "merge.html")
    assert not (tmp_path / "out").exists()
    path = save_merge_html(small(), tmp_path / "out" / "merge.html")
    assert path.read_text(encoding="utf-8") == render_merge_html(small())


def test_every_colour_of_a_picture_follows_the_page():
    for plate in merge_plates(read_merge_report(small(evaluation=samples.evaluation()))):
        for panel in plate.panels:
            themed = re.sub(r"var\(--c([0-9a-f]{6}),#\1\)", "", inline_svg(panel, "x"))
            assert re.findall(r"#[0-9a-fA-F]{6}\b", themed) == [], panel.name


def test_the_words_of_a_picture_carry_its_numbers():
    raw = small(evaluation=samples.evaluation())
    found = {p.name: p.description for plate in merge_plates(read_merge_report(raw)) for p in plate.panels}
    plain = {name: text.replace("\u00a0", " ") for name, text in found.items()}
    assert plain["broken-tasks"] == "GSM8K −11.2 (−15.1 to −7.3), ScienceQA −0.3 (−1.1 to +0.5)."
    assert plain["broken-fail"].startswith("τ = 0.95 50 % (30 % to 70 %)")
    assert "medicine × law −0.40" in plain["pairs-cosine"]
    assert re.match(r"Mean over the layers: q_proj [+−±]0\.0\d, ", plain["cancels-norm"])


def test_a_cell_is_a_module_type_of_a_layer_averaged_over_pairs_and_namesakes():
    raw = small(("one", "two"), types=("experts.0.w1", "experts.1.w1"))
    for row, value in zip(raw["modules"], (0.1, 0.3, 0.5, 0.5), strict=True):
        row["pairs"] = [samples.pair((0, 1), value, value, 0.0)]
    plate = next(p for p in merge_plates(read_merge_report(raw)) if p.name == "where")
    assert plate.panels[0].description.replace("\u00a0", " ") == "Mean over the layers: w1 35 %."


def test_modules_outside_the_layers_are_named_in_the_caption():
    plates = merge_plates(read_merge_report(samples.stress_report()))
    assert "Modules outside the layers are in the table below." in next(
        p.caption for p in plates if p.name == "where"
    )
    assert not any("outside" in plate.caption for plate in merge_plates(read_merge_report(small())))


def test_shared_gains_are_explained_where_adapters_have_them():
    raw = small()
    raw["adapters"][0]["method"] = raw["adapters"][2]["method"] = "hiplora"
    assert "share the directions of their gains by construction" in render_merge_html(raw)
    raw["adapters"][0]["method"] = "proj-lora"
    assert "by construction" not in render_merge_html(raw)


def test_what_cancels_is_shown_against_unrelated_updates():
    raw = small(("one", "two"), types=("q_proj",))
    for row, ratio, conflict in zip(raw["modules"], (0.9, 0.5), (0.1, 0.4), strict=True):
        row |= {"norm_ratio": ratio, "unrelated": 0.8, "sign_conflict": conflict}
    plate = next(p for p in merge_plates(read_merge_report(raw)) if p.name == "cancels")
    assert [panel.description for panel in plate.panels] == [
        "Mean over the layers: q_proj −0.10.",
        "Mean over the layers: q_proj +0.05.",
    ]
    norms, signs = (inline_svg(panel, "x") for panel in plate.panels)
    strongest = "fill: var\\(--c{},#{}\\); opacity: 0.95"
    blue, orange = (strongest.format(colour[1:], colour[1:]) for colour in (heat.BLUE, heat.ORANGE))
    assert len(re.findall(orange, norms)) == 2, "the cell that cancels, and the key"
    assert len(re.findall(blue, norms)) == 1, "the key"
    assert len(re.findall(orange, signs)) == 2
    assert len(re.findall(blue, signs)) == 1


def test_a_cell_is_stronger_the_larger_its_value_and_zero_is_no_gap():
    scale = heat.Scale(0.5, str)
    shades = [scale.strength(value) for value in (0.0, 0.1, -0.2, 0.5, 0.7)]
    assert shades == sorted(shades)
    assert shades[0] > 0
    assert shades[-1] == shades[-2] < 1
    assert heat.Scale(0.0, str).strength(0.0) == shades[0]


def test_the_numbers_of_a_matrix_are_in_the_picture():
    plate = next(p for p in merge_plates(read_merge_report(small())) if p.name == "pairs")
    svg = ET.fromstring(inline_svg(plate.panels[2], "x"))
    texts = [element.text for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("−0.40") == 6
    assert "2  law" in texts


@pytest.mark.parametrize(
    ("value", "text"), [(1.25, "+1.2"), (-3.44, "−3.4"), (0.0, "±0.0"), (-0.04, "±0.0"), (None, "—")]
)
def test_points_carry_their_sign(value, text):
    assert points(value) == text


def test_odd_values_draw_without_a_warning(recwarn):
    for plate in merge_plates(read_merge_report(samples.stress_report())):
        for panel in plate.panels:
            inline_svg(panel, "x")
    assert [str(warning.message) for warning in recwarn] == []
