"""The λ curve's section from results made by hand."""

import pytest

from hiplora.reporting.study.write import write_report
from hiplora.study.protocols import lambda_curve, single_task
from tests.unit.study.protocols.made import finish, made_study, measured, results, scored, table, trained

CHANGES = (
    "domains={sums: {title: Sums, train: {path: gsm8k_train.jsonl, held_out_fraction: 0.1}, tasks: {gsm8k: 2}}, "
    "facts: {title: Facts, train: {path: alpaca.jsonl, held_out_fraction: 0.1}, tasks: {mmlu: 2}}}",
    "rates=null",
    "protocols={lambda_curve: {method: hiplora, values: [1.0, 0.0, 0.1], domains: [sums]}}",
)
FOUND = {1.0: (60, 48), 0.0: (90, 20), 0.1: (80, 40)}  # λ → score on sums, on facts


@pytest.fixture
def study(tmp_path):
    found, store = made_study(tmp_path, *CHANGES)
    settings = found.recipe.protocols.lambda_curve
    finish(store, found.score(), scored({"gsm8k": [50, 50], "mmlu": [50, 50]}))
    for price, (sums, facts) in FOUND.items():
        row = found.variant("hiplora", stability_weight=price)
        for seed, shift in ((42, -4), (100, 4)):
            adapter = found.adapter(row, "sums", seed)
            finish(store, adapter, trained(after=1 + price))
            items = {"gsm8k": [sums + shift] * 2, "mmlu": [facts + shift] * 2}
            finish(store, found.score(adapter), scored(items, {"prose": 0.1}))
    return found, settings, store


def test_score_and_retain_stand_beside_each_price(study):
    found, settings, store = study
    rows = table(lambda_curve.section(found, settings, results(store)), "lambda-curve-accuracy")
    assert list(rows) == ["1", "0", "0.1"]
    for price, (sums, facts) in FOUND.items():
        row = rows[f"{price:g}"]
        assert row["Downstream"].value == pytest.approx(sums)
        assert row["Retain"].value == pytest.approx(50 - facts)
        assert row["Held-out loss"].value == pytest.approx(1 + price)


def test_the_change_is_that_from_the_lowest_price_to_the_highest(study):
    found, settings, store = study
    section = lambda_curve.section(found, settings, results(store))
    one = measured(section, "retain change", "HiP-LoRA", form="likelihood")
    assert (one.value, one.setting) == (pytest.approx(2 - 30), {"from": 0, "to": 1})
    assert any("Retain changes by −28.0 pp" in text for text in section.text)


def test_the_curve_is_of_likelihoods_in_the_order_of_prices(study):
    found, settings, store = study
    (figure,) = lambda_curve.section(found, settings, results(store)).figures
    (series,) = figure.series
    assert list(series.labels) == ["λ = 0", "λ = 0.1", "λ = 1"]
    assert list(series.x) == pytest.approx([90, 80, 60])
    assert list(series.y) == pytest.approx([30, 10, 2])


def test_the_price_of_the_method_itself_is_its_row_in_other_protocols(tmp_path):
    change = (
        "protocols={single_task: {methods: [hiplora]}, lambda_curve: {method: hiplora, values: [0.1, 1.0]}}"
    )
    found, _ = made_study(tmp_path, change)
    protocols = found.recipe.protocols
    jobs = set(lambda_curve.jobs(found, protocols.lambda_curve))
    assert set(single_task.jobs(found, protocols.single_task)) < jobs
    assert len(jobs) == 1 + 2 * 4 * 2


def test_a_price_without_all_its_runs_has_no_row(study, tmp_path):
    found, settings, store = study
    lost = lambda_curve.jobs(found, settings)[-1]
    (store.path / "results" / f"{lost.key}.json").unlink()
    section = lambda_curve.section(found, settings, results(store))
    assert list(table(section, "lambda-curve-accuracy")) == ["1", "0"]
    assert section.missing == [lost.name]
    write_report(tmp_path / "report", "Made", {}, [section], {})


def test_without_any_result_the_section_can_be_shown(tmp_path):
    found, store = made_study(tmp_path, *CHANGES)
    section = lambda_curve.section(found, found.recipe.protocols.lambda_curve, results(store))
    assert (section.measurements, section.figures) == ([], [])
    write_report(tmp_path / "report", "Nothing", {}, [section], {})
