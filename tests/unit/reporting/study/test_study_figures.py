import csv
import io
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from hiplora.errors import ConfigError
from hiplora.reporting.canvas import inline_svg
from hiplora.reporting.palette import LOOKS, NEUTRAL
from hiplora.reporting.study.figures import caption, draw, figure_csv, plate, save
from hiplora.reporting.study.matrices import shades
from hiplora.reporting.study.points import limits, points
from hiplora.reporting.study.spec import Grid, Matrix, Plot, Section, Series
from hiplora.reporting.study.styles import figure_styles, legend_of, report_styles, styles_of
from tests.unit.reporting.study import study_samples as samples

NAN = math.nan


def plot(*series, **changes):
    values = {"name": "p", "title": "T", "x_label": "x", "y_label": "y", "series": series}
    return Plot(**(values | changes))


def words(figure):
    root = ET.fromstring(draw(figure))
    return [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]


ALL = [samples.lines_plot(), samples.curve_plot(), samples.loss_plot(), samples.matrix(), samples.matrices()]


@pytest.mark.parametrize("figure", ALL, ids=lambda figure: figure.name)
def test_the_same_figure_gives_the_same_bytes(figure, tmp_path):
    first, second = save(figure, tmp_path / "a"), save(figure, tmp_path / "b")
    assert [path.name for path in first] == [f"{figure.name}.{kind}" for kind in ("svg", "pdf", "csv")]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert first[1].read_bytes().startswith(b"%PDF")
    assert b"CreationDate" not in first[1].read_bytes()


@pytest.mark.parametrize("x_log", [False, True])
@pytest.mark.parametrize("y_log", [False, True])
@pytest.mark.parametrize("kind", ["lines", "points"])
@pytest.mark.parametrize(
    "series",
    [
        [],
        [Series("LoRA", [], [])],
        [Series("LoRA", [1.0], [2.0])],
        [Series("LoRA", [1.0], [NAN])],
        [Series("LoRA", [1.0, 2.0, 3.0], [1.0, NAN, 3.0], [0.5, NAN, 2.0], [1.5, NAN, NAN])],
        [Series("LoRA", [0.0, -1.0], [0.0, -2.0], [-1.0, -3.0], [1.0, -1.0])],
        [Series("LoRA", [1.0, 2.0], [math.inf, 5.0])],
        [Series("LoRA", [1e-12, 1e12], [1e-100, 1e100])],
        [Series("LoRA", [7.0, 7.0], [3.0, 3.0], labels=["one", "two"])],
    ],
)
def test_few_no_and_impossible_points_are_drawn_or_said(series, kind, x_log, y_log):
    figure = plot(*series, kind=kind, x_log=x_log, y_log=y_log)
    shown = [point for one in series for point in points(one, figure) if point]
    texts = words(figure)
    assert ("nothing measured yet" in texts) == (not shown)
    assert b"nan" not in draw(figure).lower()


def test_a_gap_in_a_line_stays_a_gap():
    found = points(Series("a", [1.0, 2.0, 3.0], [1.0, NAN, 3.0]), plot())
    assert [point is None for point in found] == [False, True, False]
    assert limits([plot(Series("a", [1.0, 2.0, 3.0], [1.0, NAN, 3.0]))])[0][1] > 3.0


def test_points_that_a_logarithmic_axis_cannot_show_are_counted_in_the_caption():
    figure = plot(Series("a", [1.0, 2.0, 3.0], [0.0, -1.0, 2.0]), y_log=True, note="A note.")
    assert (
        caption(figure)
        == "A note. 2 points cannot be drawn (infinite, or at most zero on a logarithmic axis)."
    )
    assert caption(replace(figure, y_log=False)) == "A note."


def test_an_interval_that_reaches_below_a_logarithmic_axis_keeps_the_axis():
    figure = plot(Series("a", [1.0, 2.0], [1.0, 2.0], [-5.0, 1.0], [2.0, 3.0]), y_log=True)
    assert limits([figure])[1][0] > 0.5


@pytest.mark.parametrize("field", ["y", "low", "high", "x_low", "x_high", "labels"])
def test_lists_of_unequal_length_are_named(field):
    series = replace(Series("LoRA", [1.0, 2.0], [1.0, 2.0]), **{field: [1.0]})
    with pytest.raises(ConfigError, match=f"figure p, series 'LoRA': 1 values in {field} for 2 in x"):
        draw(plot(series))


def test_a_logarithmic_axis_has_plain_labels():
    texts = words(plot(Series("a", [0.01, 1.0, 100.0], [1.0, 2.0, 3.0]), x_log=True))
    assert {"0.01", "1", "100"} <= set(texts)
    assert not any("$" in text or "e-" in text for text in texts)


def test_between_whole_numbers_there_are_no_ticks():
    texts = words(plot(Series("a", [2.0, 3.0, 4.0], [0.5, 0.25, 1.0]), x_label="size"))
    assert texts[1 : texts.index("size")] == ["2", "3", "4"]  # after the legend


def test_the_papers_series_are_named_hollow_dotted_and_of_their_methods_colour():
    figure = samples.lines_plot()
    legend = legend_of(figure, figure_styles(figure))
    assert list(legend)[-2:] == ["LoRA (paper)", "HiP-LoRA (paper)"]
    for name in ("LoRA", "HiP-LoRA"):
        ours, theirs = legend[name], legend[f"{name} (paper)"]
        assert (ours.hollow, theirs.hollow) == (False, True)
        assert theirs.colour == ours.colour
        assert theirs.dashes != ours.dashes
    assert "LoRA (paper)" in words(figure)


def test_a_method_has_one_look_in_all_figures_of_a_report():
    styles = report_styles(samples.sections())
    for section in samples.sections():
        for figure in section.figures:
            for name, look in legend_of(figure, styles).items():
                if not look.hollow:
                    assert look == styles[name]
    assert styles["HiP-LoRA"].colour == LOOKS[0].colour


def test_no_two_of_many_names_look_alike_and_names_of_one_figure_share_no_hue():
    crowd = [f"variant {place}" for place in range(16)]
    figures = [
        plot(*(Series(name, [1], [1]) for name in ["HiP-LoRA", *group]), name=f"f{place}")
        for place, group in enumerate((crowd[:8], crowd[8:13]))
    ]
    styles = report_styles([Section("s", "S", figures=figures)])
    looks = [(look.colour, look.marker, look.dashes) for look in styles.values()]
    assert len(looks) == len(set(looks)) == 14
    assert len({styles[name].colour for name in ["HiP-LoRA", *crowd[8:13]]}) == 6


def test_the_base_model_is_grey():
    assert styles_of(["base model", "LoRA"])["base model"] == NEUTRAL


def test_the_parts_of_a_grid_have_equal_axes():
    far = [plot(Series("a", [0.0, 1.0], [0.0, 1.0])), plot(Series("a", [5.0, 9.0], [50.0, 90.0]))]
    shared = limits(far)
    assert shared[0][0] < 0 < 9 < shared[0][1]
    svgs = [inline_svg(panel, "p") for panel in plate(Grid("g", "G", far)).panels]
    ticks = [re.findall(r"<text[^>]*>([0-9]+)</text>", svg) for svg in svgs]
    assert ticks[0] == ticks[1] != []


def test_a_matrix_has_its_numbers_written_in_and_its_gaps_empty():
    texts = words(samples.matrix())
    assert {"62.1", "65.1", "HumanEval", "HiP-LoRA (%)"} <= set(texts)
    assert sum(bool(re.fullmatch(r"\d+\.\d", text)) for text in texts) == 10


def test_matrices_of_a_grid_share_their_shades():
    low, high = samples.matrix(shift=-20), samples.matrix()
    scale = shades([low, high])
    assert scale.strength(65.1) > scale.strength(45.1) > scale.strength(36.1)
    assert scale.strength(65.1) < shades([low]).strength(45.1) + 1e-9


@pytest.mark.parametrize("values", [[[None]], [[NAN]], [[5.0]], [[math.inf]], [[-3.0]], [[0.0]]])
def test_a_matrix_of_one_cell_is_drawn(values):
    texts = words(Matrix("m", "M", ["r"], ["c"], values))
    empty = values[0][0] is None or math.isnan(values[0][0])
    assert ("nothing measured yet" in texts) == empty


def test_a_matrix_without_rows_or_a_grid_without_parts_is_drawn():
    assert "nothing measured yet" in words(Matrix("m", "M", [], [], []))
    assert "nothing measured yet" in words(Grid("g", "G", []))


def test_a_matrix_whose_values_do_not_fit_its_names_is_named():
    with pytest.raises(ConfigError, match="figure m: 0 rows of values for 1 row names"):
        draw(Matrix("m", "M", ["r"], ["c"], []))
    with pytest.raises(ConfigError, match="figure m, row 'r': 2 values for 1 columns"):
        draw(Matrix("m", "M", ["r"], ["c"], [[1.0, 2.0]]))


def test_labels_that_have_no_room_are_left_out_and_none_covers_another():
    crowded = plot(
        Series("a", [1.0] * 40, [1.0] * 40, labels=[f"label {place}" for place in range(40)]), kind="points"
    )
    written = [text for text in words(crowded) if text and text.startswith("label")]
    assert 1 <= len(written) < 20
    apart = plot(Series("a", [1.0, 2.0, 3.0], [1.0, 5.0, 2.0], labels=["l1", "l2", "l3"]))
    assert {"l1", "l2", "l3"} <= set(words(apart))


def test_a_figures_csv_has_all_its_data():
    rows = list(csv.reader(io.StringIO(figure_csv(samples.lines_plot()))))
    assert rows[0] == [
        "series",
        "threshold τ",
        "merges that fail, %",
        "merges that fail, %, low",
        "merges that fail, %, high",
    ]
    assert len(rows) == 1 + 7 * 6 + 2
    assert rows[-1] == ["HiP-LoRA (paper)", "0.9", "6.8", "", ""]
    grid = list(csv.reader(io.StringIO(figure_csv(samples.matrices()))))
    assert grid[0] == ["part", "", *samples.TASKS]
    assert len(grid) == 1 + 16


def test_a_picture_is_described_for_those_who_cannot_see_it():
    svg = inline_svg(plate(samples.matrix()).panels[0], "m")
    assert "2 (+ScienceQA): MMLU 60.1, ScienceQA 63.1." in svg
    svg = inline_svg(plate(samples.curve_plot()).panels[0], "c")
    assert "LoRA: 70.2 at 12.1." in svg


def test_the_picture_of_a_very_long_title_keeps_its_width():
    figure = plot(Series("a", [1.0], [1.0]), title="word " * 60)
    panel = plate(figure).panels[0]
    assert panel.width == 640
    assert max(map(len, panel.title.splitlines())) < 80
