"""The section on rank-1 interventions from results made by hand."""

import numpy as np
import pytest

from hiplora.reporting.study.write import write_report
from hiplora.study.protocols import rank_one
from tests.unit.study.protocols.made import finish, made_study, measured, results, table

CHANGES = (
    "protocols={rank_one: {layers: [0], modules: [q_proj, v_proj], directions: 2, kinds: [zero, noise_0.1], "
    "bases: [weight, activation], tokens: 64}}",
)


def correlation(estimate, low=None, high=None, p=0.03):
    return {"estimate": estimate, "low": low, "high": high, "p_value": p, "reason": ""}


def finding(kind, metric, pearson, spearman, of="all"):
    return {
        "kind": kind, "metric": metric, "type": of, "left_out": 0, "points": 4, "pearson": pearson,
        "spearman": spearman,
    }  # fmt: skip


def record(module, sigma, kl, kind="zero", index=0):
    return {
        "module": f"model.layers.0.self_attn.{module}", "layer": 0, "type": module, "index": index, "rank": 9,
        "sigma": sigma, "relative": 1.0, "kind": kind, "draw": 0, "factor": -1.0,
        "drop": {"kl": kl, "log_perplexity": -kl},
    }  # fmt: skip


WEIGHT = {
    "modules": ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"],
    "correlations": [
        finding("zero", "kl", correlation(0.8, 0.4, 0.9, 0.001), correlation(0.5, -0.1, 0.9)),
        finding("zero", "kl", correlation(0.2, -0.5, 0.7), correlation(0.1, -0.5, 0.6), of="q_proj"),
        finding("zero", "log_perplexity", correlation(0.3, -0.2, 0.6), correlation(0.2, -0.3, 0.5)),
        finding("noise_0.1", "kl", correlation(0.1, -0.3, 0.4), correlation(None)),
    ],
    "records": [
        record("q_proj", 2.0, 0.5),
        record("v_proj", 1.0, 0.25),
        record("v_proj", 0.5, 0.0, index=1),
        record("q_proj", 2.0, 0.1, "noise_0.1"),
    ],
}
ACTIVATION = {**WEIGHT, "correlations": [finding("zero", "kl", correlation(None), correlation(None))]}


@pytest.fixture
def study(tmp_path):
    found, store = made_study(tmp_path, *CHANGES)
    settings = found.recipe.protocols.rank_one
    for job, result in zip(rank_one.jobs(found, settings), (WEIGHT, ACTIVATION), strict=True):
        finish(store, job, result)
    return found, settings, store


def test_a_row_is_an_intervention_with_both_correlations_over_all_modules(study):
    found, settings, store = study
    section = rank_one.section(found, settings, results(store))
    rows = table(section, "rank-one-weight-kl")
    assert list(rows) == ["Zero", "Noise 0.1"]
    zero = rows["Zero"]
    assert (zero["Pearson"].value, zero["Pearson"].low, zero["Pearson"].high) == (0.8, 0.4, 0.9)
    assert (zero["Directions"].value, zero["Pearson p"].value, zero["Spearman"].value) == (4, 0.001, 0.5)
    assert list(table(section, "rank-one-weight-log-perplexity")) == ["Zero"]


def test_the_papers_values_stand_beside_the_weight_basis_and_lost_performance_alone(study):
    found, settings, store = study
    section = rank_one.section(found, settings, results(store))
    papers = {
        column: one.paper for column, one in table(section, "rank-one-weight-log-perplexity")["Zero"].items()
    }
    assert papers == {
        "Directions": 29, "Pearson": 0.856, "Pearson p": 3.09e-9, "Spearman": 0.412, "Spearman p": 0.026,
    }  # fmt: skip
    for name in ("rank-one-weight-kl", "rank-one-activation-kl"):
        assert all(one.paper is None for one in table(section, name)["Zero"].values())


def test_types_of_modules_are_measured_too_and_what_is_undefined_is_not(study):
    found, settings, store = study
    section = rank_one.section(found, settings, results(store))
    weight, _ = rank_one.jobs(found, settings)
    setting = {"metric": "kl", "basis": "weight", "type": "q_proj", "p": 0.03}
    one = measured(section, "pearson", "Zero", setting=setting)
    assert (one.value, one.low, one.high, one.items, one.jobs) == (0.2, -0.5, 0.7, 4, (weight.key,))
    assert [one.metric for one in section.measurements if one.method == "Noise 0.1"] == ["pearson"]
    assert {one.setting["basis"] for one in section.measurements} == {"weight"}


def test_a_dot_is_a_direction_and_what_has_no_logarithm_is_counted(study):
    found, settings, store = study
    weight, activation = rank_one.section(found, settings, results(store)).figures
    assert (weight.name, activation.name) == ("rank-one-weight", "rank-one-activation")
    zero, noise = weight.parts
    assert {one.name: (one.x, one.y) for one in zero.series} == {
        "q_proj": ([2.0], [0.5]),
        "v_proj": ([1.0], [0.25]),
    }
    assert [(one.name, one.y) for one in noise.series] == [("q_proj", [0.1])]
    assert weight.note.endswith("not above 0: 1.")


def test_the_text_says_which_correlations_are_told_from_none(study, tmp_path):
    found, settings, store = study
    section = rank_one.section(found, settings, results(store))
    (text,) = section.text  # of the activation basis nothing is defined
    assert "Zero 0.80, Noise 0.1 0.10. Told from none: Zero;" in text
    assert "larger than about 0.30" in text  # the intervals' half widths are 0.25 and 0.35
    write_report(tmp_path / "report", "Made", {}, [section], {})


def test_it_is_told_how_far_apart_two_interventions_correlations_are(study):
    found, settings, store = study
    weight, _ = rank_one.jobs(found, settings)
    rows = [record("q_proj", float(sigma), kl, kind, index)
            for kind, drops in (("zero", (4.0, 3.0, 1.0, 0.5)), ("noise_0.1", (1.0, 4.0, 3.0, 0.5)))
            for index, (sigma, kl) in enumerate(zip((4, 3, 2, 1), drops, strict=True))]  # fmt: skip
    (store.path / "results" / f"{weight.key}.json").unlink()
    finish(store, weight, {**WEIGHT, "records": rows})
    section = rank_one.section(found, settings, results(store))
    setting = {"metric": "log_perplexity", "basis": "weight", "minus": "Noise 0.1"}
    one = measured(section, "pearson difference", "Zero", setting=setting)
    expected = np.corrcoef([4, 3, 2, 1], [-4, -3, -1, -0.5]) - np.corrcoef([4, 3, 2, 1], [-1, -4, -3, -0.5])
    assert one.value == pytest.approx(expected[0, 1])
    assert (one.items, one.jobs) == (4, (weight.key,))
    assert one.low < one.value < one.high
    assert any(f"Zero over Noise 0.1 −{abs(one.value):.2f} [" in text for text in section.text)
    rest = measured(section, "pearson without the strongest", "Zero", setting={
        "metric": "log_perplexity", "basis": "weight", "without": "model.layers.0.self_attn.q_proj, σ = 4.0",
    })  # fmt: skip
    assert rest.value == pytest.approx(np.corrcoef([3, 2, 1], [-3, -1, -0.5])[0, 1])
    assert rest.items == 3
    told = next(text for text in section.text if "without its strongest direction" in text)
    assert f"Zero −{abs(rest.value):.2f} [" in told


def test_each_basis_is_one_job_that_changes_with_its_settings(tmp_path):
    found, _ = made_study(tmp_path, *CHANGES)
    settings = found.recipe.protocols.rank_one
    weight, activation = rank_one.jobs(found, settings)
    assert (weight.kind, weight.settings["basis"], activation.settings["basis"]) == (
        "probe", "weight", "activation",
    )  # fmt: skip
    assert weight != activation
    assert rank_one.jobs(found, settings) == [weight, activation]
    other = settings.model_copy(update={"directions": 3, "bases": ["weight"]})
    assert rank_one.jobs(found, other) != [weight]


def test_a_basis_that_is_not_probed_yet_is_missing_alone(study):
    found, settings, store = study
    weight, _ = rank_one.jobs(found, settings)
    (store.path / "results" / f"{weight.key}.json").unlink()
    section = rank_one.section(found, settings, results(store))
    assert section.missing == [weight.name]
    assert [figure.name for figure in section.figures] == ["rank-one-activation"]


def test_without_any_result_everything_is_missing(tmp_path):
    found, store = made_study(tmp_path, *CHANGES)
    settings = found.recipe.protocols.rank_one
    section = rank_one.section(found, settings, results(store))
    assert (section.tables, section.measurements) == ([], [])
    assert set(section.missing) == {job.name for job in rank_one.jobs(found, settings)}
    write_report(tmp_path / "report", "Nothing", {}, [section], {})
