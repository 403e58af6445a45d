import re
from dataclasses import replace

import pytest

from hiplora.errors import ConfigError
from hiplora.reporting.study.page import render_study
from hiplora.reporting.study.spec import Grid, Matrix, Plot, Section, Series
from hiplora.reporting.study.write import write_report
from tests.unit.reporting.page_checks import Tags, assert_asks_for_nothing, assert_well_formed
from tests.unit.reporting.study import study_samples as samples

SUMMARY = {"headline": "What was found.", "text": ["First.", "Second."], "jobs done": 41}


def text_of(page):
    return re.sub(r"<[^>]+>", "", page).replace("\u00a0", " ")


def render(sections, summary=SUMMARY):
    return render_study("A study", summary, sections, samples.PROVENANCE)


@pytest.fixture(scope="module")
def page():
    return render(samples.sections())


def test_the_page_is_well_formed_and_its_ids_are_unique(page):
    assert_well_formed(page)


def test_the_page_can_ask_for_nothing(page):
    assert_asks_for_nothing(page)
    assert re.findall(r"https?://(?!www\.w3\.org/)", page) == []


def test_every_link_leads_to_a_place_on_the_page(page):
    tags = Tags(page)
    targets = [attrs["href"][1:] for tag, attrs in tags.tags if tag == "a"]
    assert {f"s-{section.name}" for section in samples.sections()} < set(targets)
    assert set(targets) <= set(tags.ids)


def test_the_words_come_first(page):
    text = text_of(page)
    order = ["What was found.", "First.", "Second.", "jobs done", "Single-task adaptation"]
    order += ["HiP-LoRA loses least elsewhere.", "Scores &amp; retention"]
    places = [text.index(part) for part in order]
    assert places == sorted(places)


def test_every_picture_has_words_and_its_data_below_it(page):
    tags = Tags(page)
    pictures = [attrs for tag, attrs in tags.tags if tag == "svg" and attrs.get("class") == "plot"]
    assert len(pictures) == 2 + 1 + 4 + 1 + 3
    for attrs in pictures:
        assert attrs["role"] == "img"
        assert set(attrs["aria-labelledby"].split()) <= set(tags.ids)
    figures = sum(tag == "figure" for tag, _ in tags.tags)
    assert page.count("The data of this figure</summary>") == figures == 6


def test_tables_scroll_and_the_keyboard_reaches_them(page):
    frames = [attrs for _, attrs in Tags(page).tags if "scroll" in (attrs.get("class") or "").split()]
    assert len(frames) >= page.count("<table")
    assert all(
        attrs["tabindex"] == "0" and attrs["role"] == "region" and attrs["aria-label"] for attrs in frames
    )


def test_a_section_says_how_many_jobs_are_missing_and_which(page):
    text = text_of(page)
    assert "This section waits for 12 jobs" in text
    assert "merge-11" in text
    assert "This section waits for 1 job\n" in text
    assert "edit-lora-42" in text
    assert (
        len(re.findall(r'<details class="missing" open>', page)) == 2
    )  # of three: twelve names are folded away


def test_values_of_the_paper_are_said_to_be_the_papers(page):
    assert '<span class="paper">paper: 12.3</span>' in page
    assert "Values marked “paper”" in page
    assert "LoRA (paper)" in text_of(page)
    alone = [Section("a", "A", figures=[Plot("p", "P", "x", "y", [Series("LoRA", [1.0], [2.0])])])]
    assert "Values marked “paper”" not in render(alone)


def test_an_empty_study_is_a_page():
    page = render_study("Nothing", {}, [], {})
    assert Tags(page).wrong == []
    assert "<nav" not in page
    assert "Nothing measured yet." in text_of(render([Section("a", "A")]))


def test_long_data_is_cut_on_the_page_and_says_where_it_is_whole(page):
    assert "The first 200 of 6,000 rows; all are in figures/spectrum.csv." in text_of(page)
    many = [Section("a", "A", measurements=[samples.measurement(value=place) for place in range(250)])]
    assert "The first 200 of 250 rows; all are in measurements.csv." in text_of(render(many))


@pytest.mark.parametrize(
    ("value", "shown"), [(float("nan"), "–"), (float("inf"), "∞"), (1e-9, "1.000 × 10⁻⁹")]
)
def test_a_measurement_without_a_number_is_a_dash_in_the_list(value, shown):
    sections = [Section("a", "A", measurements=[samples.measurement(value=value, low=None, high=None)])]
    assert f'<td class="n">{shown}</td>' in render(sections).replace("\u00a0", " ")


def test_names_are_text_and_never_markup():
    evil = "<script>alert(1)</script>"
    sections = [
        Section("a", evil, [evil], [replace(samples.table(), title=evil, note=evil)],
                [Plot("p", evil, evil, evil, [Series(evil, [1.0], [2.0], labels=[evil])], note=evil),
                 Grid("g", evil, [Matrix("m", evil, [evil], [evil], [[1.0]], evil)], evil)],
                [samples.measurement(method=evil, setting={evil: evil})], [evil])
    ]  # fmt: skip
    page = render_study(evil, {"headline": evil, "text": evil, evil: evil}, sections, {evil: evil})
    tags = Tags(page)
    assert tags.wrong == []
    assert "script" not in {tag for tag, _ in tags.tags}


@pytest.mark.parametrize("name", ["../up", "Upper", "", "a b", "-x"])
def test_a_name_that_is_no_file_name_is_refused(name):
    with pytest.raises(ConfigError, match="its name is that of its files"):
        render([Section("a", "A", figures=[samples.matrix(name)])])


def test_two_figures_or_tables_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="figure 'continual': two have this name"):
        render([Section("a", "A", figures=[samples.matrix()]), Section("b", "B", figures=[samples.matrix()])])
    with pytest.raises(ConfigError, match="table 'single-task': two have this name"):
        render([Section("a", "A", tables=[samples.table(), samples.table()])])


def test_the_report_is_a_folder_of_data_tables_figures_and_a_page_always_the_same(tmp_path):
    sections = samples.sections()[1:3]
    pages = [write_report(tmp_path / name, "T", SUMMARY, sections, samples.PROVENANCE) for name in ("a", "b")]
    files = sorted(str(path.relative_to(tmp_path / "a")) for path in (tmp_path / "a").rglob("*.*"))
    figures = [
        f"figures/{name}.{kind}" for name in ("continual", "one", "tau") for kind in ("csv", "pdf", "svg")
    ]
    tables = ["tables/merging.md", "tables/merging.tex"]
    assert files == [*figures, "measurements.csv", "measurements.json", "report.html", *tables]
    assert pages[0] == tmp_path / "a" / "report.html"
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_report_replaces_another_only_when_told(tmp_path):
    write_report(tmp_path / "r", "T", {}, [], {})
    with pytest.raises(ConfigError, match="overwrite"):
        write_report(tmp_path / "r", "T", {}, [], {})
    bad = [Section("a", "A", figures=[Plot("p", "P", "x", "y", [Series("a", [1.0], [])])])]
    with pytest.raises(ConfigError, match="series 'a'"):
        write_report(tmp_path / "r", "T", {}, bad, {}, overwrite=True)
    assert (tmp_path / "r" / "report.html").exists()
    write_report(tmp_path / "r", "New", {}, [], {}, overwrite=True)
    assert "<h1>New</h1>" in (tmp_path / "r" / "report.html").read_text()
