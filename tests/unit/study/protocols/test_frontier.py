"""The section of the frontiers from results made by hand."""

import math

import pytest

from hiplora.reporting.study.write import write_report
from hiplora.study.protocols import frontier, sections
from hiplora.study.protocols.frontier_points import scoring_jobs
from hiplora.study.statistics import geometric
from tests.unit.study.protocols.made import finish, made_study, measured, results, scored, table, trained

CHANGES = (
    "domains={sums: {title: Sums, train: {path: gsm8k_train.jsonl, held_out_fraction: 0.1}, tasks: {gsm8k: 2}}, "
    "facts: {title: Facts, train: {path: alpaca.jsonl, held_out_fraction: 0.1}, tasks: {mmlu: 2}}}",
    "rates=null",
)
FRONTIER = (
    "domains: {sums: [lora, lora-mlp, hiplora]}, rates: [0.001, 0.01], plain: [lora, lora-mlp], attention: lora, "
    "reference: hiplora"
)
# (method, rate, steps) → a seed each: loss, KL on prose (four times that on code), likelihood of the own task
FOUND = {
    ("hiplora", 1e-3, None): [(2.0, 0.001, 40), (2.0, 0.001, 40)],
    ("hiplora", 1e-2, None): [(1.5, 0.01, 50), (1.5, 0.01, 50)],
    ("lora", 1e-3, None): [(2.0, 0.1, 40), (2.0, 0.1, 40)],
    ("lora", 1e-2, None): [(1.0, 10.0, 60), (1.0, 40.0, 60)],
    ("lora-mlp", 1e-3, None): [(2.2, 0.05, 30), (2.2, 0.05, 30)],
    ("lora-mlp", 1e-2, None): [(1.6, 0.1, 45), (1.6, 0.1, 45)],
    ("lora-mlp", 1e-3, 3): [(2.3, 0.05, 30), (2.3, 0.05, 30)],
    ("lora-mlp", 1e-2, 3): [(1.4, 0.2, 55), (1.4, 0.2, 55)],
}
BASE = {"gsm8k": [20, 40], "mmlu": [60, 80]}
AFTER = {"hiplora": [60, 70], "lora": [40, 60], "lora-mlp": [60, 80]}  # of mmlu
EQUAL = "drift ratio at equal loss"


def made(tmp_path, more="", changed=None, asked=FRONTIER):
    """The study with what was found, some of it `changed`."""
    found, store = made_study(tmp_path, *CHANGES, f"protocols={{frontier: {{{asked}{more}}}}}")
    settings = found.recipe.protocols.frontier
    finish(store, found.score(), scored(BASE))
    for (method, rate, steps), seeds in {**FOUND, **(changed or {})}.items():
        for seed, (loss, kl, own) in zip(found.seeds(settings), seeds, strict=True):
            adapter = found.adapter(found.row(method), "sums", seed, lr=rate, steps=steps)
            finish(store, adapter, trained(before=2.5, after=loss))
            drift = {"prose": kl, "code": 4 * kl}
            finish(store, found.score(adapter), scored({"gsm8k": [own, own], "mmlu": AFTER[method]}, drift))
    return found, settings, store


@pytest.fixture
def study(tmp_path):
    return made(tmp_path)


@pytest.fixture
def section(study):
    found, settings, store = study
    return frontier.section(found, settings, results(store))


def ratio(section, method, text="all texts", metric=EQUAL, **setting):
    """The one ratio at the most that a method and the reference learned."""
    wanted = {"text": text, "operating": True, **setting}
    (one,) = [
        one
        for one in section.measurements
        if (one.metric, one.method) == (metric, method)
        and all(one.setting[key] == value for key, value in wanted.items())
    ]
    return one


@pytest.mark.parametrize("text", ["prose", "code", "all texts"])
def test_drift_at_equal_loss_is_paired_by_seed(section, text):
    # Half-way between LoRA's points the KL is √(0.1 · 10) = 1 and √(0.1 · 40) = 2, against 0.01.
    found, expected = ratio(section, "LoRA", text), geometric([100, 200])
    assert (found.value, found.low, found.high) == pytest.approx(
        (expected.value, expected.low, expected.high)
    )
    assert (found.setting["over"], found.setting["state"], found.seeds) == ("HiP-LoRA", "reached", 2)
    assert found.setting["loss"] == 1.5


def test_a_method_that_learned_less_is_compared_at_its_own_best(section):
    # At 1.6 the reference is four fifths of the way from 0.001 to 0.01.
    found = ratio(section, "LoRA on the MLPs")
    assert found.value == pytest.approx(0.1 / 10**-2.2)
    assert (found.setting["state"], found.setting["loss"]) == ("reached", pytest.approx(1.6))
    shown = table(section, "frontier-sums-equal")["LoRA on the MLPs"]
    assert (shown["Held-out loss"].value, shown["All texts"].value) == pytest.approx((1.6, 10**1.2))


def test_the_reference_at_what_another_learned_is_paired_by_seed(tmp_path):
    apart = {("lora-mlp", 1e-2, None): [(1.5, 0.1, 45), (1.7, 0.1, 45)]}
    found, settings, store = made(tmp_path, changed=apart)
    one = ratio(frontier.section(found, settings, results(store)), "LoRA on the MLPs")
    expected = geometric([0.1 / 0.01, 0.1 / 10**-2.4])
    assert (one.value, one.low, one.high) == pytest.approx((expected.value, expected.low, expected.high))


def test_a_method_that_never_learned_as_much_as_a_point_bounds_the_ratio_there_from_below(section):
    found = ratio(section, "LoRA on the MLPs", operating=False, lr=0.01)
    assert found.value == pytest.approx(10)
    assert (found.high, found.setting["state"]) == (None, "not reached")
    shown = table(section, "frontier-sums-rates")["LoRA on the MLPs"]["0.01 (loss 1.500)"]
    assert shown.text == "≥ 10 (not reached)"


def test_a_method_that_learned_less_than_every_point_of_the_reference_bounds_it_from_below(tmp_path):
    weak = {("lora-mlp", rate, None): [(loss, 0.1, 30)] * 2 for rate, loss in ((1e-3, 2.6), (1e-2, 2.4))}
    found, settings, store = made(tmp_path, changed=weak)
    one = ratio(frontier.section(found, settings, results(store)), "LoRA on the MLPs")
    assert (one.value, one.high, one.setting["state"]) == (pytest.approx(100), None, "not reached")


def test_a_method_all_of_whose_points_learned_more_bounds_it_from_above(tmp_path):
    slow = {("hiplora", 1e-3, None): [(3.0, 0.001, 40), (3.0, 0.001, 40)]}
    found, settings, store = made(tmp_path, changed=slow)
    section = frontier.section(found, settings, results(store))
    (one,) = [
        one
        for one in section.measurements
        if (one.metric, one.method) == (EQUAL, "LoRA")
        and (one.setting.get("lr"), one.setting["text"]) == (1e-3, "prose")
    ]
    assert (one.value, one.low, one.setting["state"]) == (pytest.approx(100), None, "passed")
    shown = table(section, "frontier-sums-rates")["LoRA"]["0.001 (loss 3.000)"]
    assert shown.text == "≤ 100 (learned more)"


def test_the_best_plain_lora_is_the_one_that_learned_as_much_with_the_least_drift(section, tmp_path):
    best = ratio(section, "Best plain LoRA", operating=False, lr=0.01)
    assert (best.setting["method"], best.value) == ("LoRA", pytest.approx(math.sqrt(20_000)))
    best = ratio(section, "Best plain LoRA")  # each at the most that it learned itself
    assert (best.setting["method"], best.value) == ("LoRA on the MLPs", pytest.approx(10**1.2))
    (tmp_path / "early").mkdir()
    found, settings, store = made(tmp_path / "early", ", early: {lora-mlp: [3]}")
    with_stops = frontier.section(found, settings, results(store))
    # Between the early stop's 1.4 and the whole training's 1.6, both at one rate: √(0.1 · 0.2) of 0.01.
    best = ratio(with_stops, "Best plain LoRA")
    assert (best.setting["method"], best.value) == ("LoRA on the MLPs", pytest.approx(math.sqrt(200)))
    assert "Best plain LoRA (LoRA on the MLPs)" in table(with_stops, "frontier-sums-equal")


@pytest.mark.parametrize(
    ("where", "count"), [("", 2), (", early_domains: [sums]", 2), (", early_domains: [facts]", 1)]
)
def test_early_stops_are_asked_for_in_their_domains(tmp_path, where, count):
    found, settings, _ = made(tmp_path, f", early: {{lora-mlp: [3]}}{where}")
    jobs = scoring_jobs(found, settings, "sums", "lora-mlp")
    assert len(jobs) == count * len(settings.rates)


def test_the_ratio_at_equal_likelihood_is_another_view(section):
    # At 50 % LoRA is half-way between 40 % and 60 %.
    found = ratio(section, "LoRA", metric="drift ratio at equal likelihood")
    assert found.value == pytest.approx(math.sqrt(20_000))


def test_every_rate_of_the_reference_is_compared(section):
    rows = table(section, "frontier-sums-rates")
    assert rows["LoRA"]["0.001 (loss 2.000)"].value == pytest.approx(100)
    assert rows["LoRA"]["0.01 (loss 1.500)"].value == pytest.approx(math.sqrt(20_000))


def test_who_lies_below_whom_counts_the_seeds(section):
    below = table(section, "frontier-sums-below")
    assert below["LoRA"]["Below HiP-LoRA"].text == "nowhere"
    assert below["LoRA"]["By seed"].text == "2 nowhere"
    found = measured(section, "share of losses below", "LoRA on the MLPs")
    assert (found.value, found.setting["nowhere"], found.setting["kind"]) == (0, 2, "plain")


def test_a_rival_below_everywhere_is_named(tmp_path):
    low = {("lora", rate, None): [(loss, 1e-5, 50)] * 2 for rate, loss in ((1e-3, 2.0), (1e-2, 1.0))}
    found, settings, store = made(tmp_path, changed=low)
    section = frontier.section(found, settings, results(store))
    assert measured(section, "share of losses below", "LoRA").setting["everywhere"] == 2
    assert any("below HiP-LoRA at every common loss: LoRA." in text for text in section.text)


def test_the_papers_hiplora_is_a_rival_of_another_reference(tmp_path):
    asked = FRONTIER.replace("plain: [lora, lora-mlp]", "plain: [lora]").replace(
        "reference: hiplora", "reference: lora-mlp"
    )
    found, settings, store = made(tmp_path, asked=asked)
    section = frontier.section(found, settings, results(store))
    kinds = {
        one.method: one.setting["kind"]
        for one in section.measurements
        if one.metric == "share of losses below"
    }
    assert kinds == {"LoRA": "plain", "HiP-LoRA": "rival"}


def test_what_other_tasks_lose_is_measured_against_the_base(section):
    drop = measured(section, "likelihood drop", "LoRA", setting={"lr": 0.01})
    assert (drop.value, drop.sd) == (pytest.approx(20), pytest.approx(0))
    apart = measured(section, "likelihood drop difference", "LoRA")
    assert apart.value == pytest.approx(20 - 5)
    assert apart.setting["minus"] == "HiP-LoRA"


def test_the_best_rate_and_the_edge_of_the_grid_are_told(section):
    row = table(section, "frontier-sums-best")["HiP-LoRA"]
    assert row["Rate"].text == "0.01, at the edge"
    assert (row["Held-out loss"].value, row["prose"].value) == (1.5, pytest.approx(10))
    assert row["All texts"].value == pytest.approx(20)
    assert any("at the edge of the grid for LoRA, LoRA on the MLPs, HiP-LoRA" in t for t in section.text)
    assert any("the best plain LoRA (LoRA on the MLPs) drifts 15.8 times" in text for text in section.text)


def test_the_text_that_calibrated_the_reference_is_not_among_all_texts(tmp_path):
    own = "methods.hiplora.method={name: hiplora, r: 4, calibration_text: wikitext2_raw_valid.jsonl}"
    found, store = made_study(tmp_path, *CHANGES, own, f"protocols={{frontier: {{{FRONTIER}}}}}")
    for seed in (42, 100):
        adapter = found.adapter(found.row("hiplora"), "sums", seed, lr=1e-2)
        finish(store, adapter, trained(after=1.5))
        finish(store, found.score(adapter), scored({"gsm8k": [50, 50]}, {"prose": 0.5, "code": 0.01}))
    section = frontier.section(found, found.recipe.protocols.frontier, results(store))
    assert table(section, "frontier-sums-best")["HiP-LoRA"]["All texts"].value == pytest.approx(10)


def test_points_whose_seeds_are_not_all_there_wait(study):
    found, settings, store = study
    lost = found.score(found.adapter(found.row("lora"), "sums", 100, lr=1e-2))
    (store.path / "results" / f"{lost.key}.json").unlink()
    section = frontier.section(found, settings, results(store))
    assert ratio(section, "LoRA").setting["loss"] == 2.0
    assert section.missing == [lost.name]


def test_a_training_that_diverged_is_no_point(tmp_path):
    diverged = {("lora", 1e-2, None): [(math.inf, 10.0, 60), (1.0, 40.0, 60)]}
    found, settings, store = made(tmp_path, changed=diverged)
    section = frontier.section(found, settings, results(store))
    assert ratio(section, "LoRA").setting["loss"] == 2.0


def test_without_any_result_there_is_nothing_to_show(tmp_path):
    found, store = made_study(tmp_path, *CHANGES, f"protocols={{frontier: {{{FRONTIER}}}}}")
    section = frontier.section(found, found.recipe.protocols.frontier, results(store))
    assert (section.tables, section.measurements) == ([], [])
    assert found.score().name in section.missing


def test_the_section_can_be_shown(study, section, tmp_path):
    assert [figure.name for figure in section.figures] == [
        "frontier-sums-lora",
        "frontier-sums-lora-likelihood",
        "frontier-sums-lora-drop",
    ]
    page = write_report(tmp_path / "report", "Made", {}, [section], {})
    assert "who beats whom" in page.read_text()


def test_points_that_learned_nothing_are_left_out_of_the_figures_and_named(tmp_path):
    worse = {("lora", 1e-2, None): [(3.0, 900.0, 1), (3.0, 900.0, 1)]}
    found, settings, store = made(tmp_path, changed=worse)
    by_text, by_score, drop = frontier.section(found, settings, results(store)).figures
    for plot in (*by_text.parts, by_score, drop):
        (lora,) = [series for series in plot.series if series.name == "LoRA"]
        assert len(lora.x) == 1
    for figure in (by_text, by_score, drop):
        assert "the untrained model is better: LoRA at 0.01." in figure.note


def test_the_jobs_are_those_that_the_section_reads(study):
    found, settings, store = study
    asked = frontier.jobs(found, settings)
    assert all(store.finished(job) for job in asked)
    assert len(asked) == 1 + 3 * 2 * 2


def test_a_rate_that_diverged_is_no_point_and_is_named(tmp_path):
    found, settings, store = made(tmp_path)
    seed = found.seeds(settings)[0]
    adapter = found.adapter(found.row("lora"), "sums", seed, lr=1e-2)
    for job in (adapter, found.score(adapter)):
        (store.path / "results" / f"{job.key}.json").unlink()
        finish(store, job, {"diverged": "the loss is nan"})
    told = results(store)
    section = frontier.section(found, settings, told)
    rates = {
        one.setting["lr"]
        for one in section.measurements
        if one.method == "LoRA" and one.metric == "held-out loss"
    }
    assert rates == {1e-3}
    assert section.missing == []
    assert told.lost == {adapter.name: None}
    (whole,) = [one for one in sections(found, results(store)) if one.name == "frontier"]
    assert (
        whole.text[-1] == f"Diverged in training, so that there is nothing to show of them: {adapter.name}."
    )
    assert whole.missing == []
