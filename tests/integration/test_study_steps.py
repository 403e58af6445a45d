"""The steps of a study on the smallest model: what each finds, and that neither a kill nor the step before it shows."""

import json
import math

import pytest
import torch

from hiplora.editing import AdapterEditor, AlphaEditor
from hiplora.errors import ConfigError, HipLoraError
from hiplora.probing import run as probe_run
from hiplora.study.engine.bench import Bench, Place
from hiplora.study.engine.jobs import Job
from hiplora.study.engine.store import Store
from hiplora.study.engine.todo import done
from hiplora.study.engine.worker import do
from hiplora.study.pico_data import write_pico_data
from hiplora.study.steps import step

DRIFT = {"texts": {"prose": "wikitext2_raw_valid.jsonl"}, "tokens": 64, "window": 64}
LORA = {"name": "lora", "r": 4, "lora_alpha": 8}
ALPHAEDIT = {
    "name": "alphaedit",
    "calibration_tokens": 300,
    "value_steps": 3,
    "prefixes": 1,
    "prefix_tokens": 3,
    "ridge": 1e-3,
    "threshold": 0.4,
}
METHODS = {
    "lora": LORA,
    "pissa": {"name": "pissa", "r": 4, "lora_alpha": 4},
    "hiplora": {"name": "hiplora", "r": 4, "principal_rank": 4, "calibration_tokens": 300},
    "alphaedit": ALPHAEDIT,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_pico_data(folder)
    return folder


@pytest.fixture(scope="module")
def network(data, tmp_path_factory):
    """One pico for all benches, and its bits."""
    model, tokenizer = Bench(Store(tmp_path_factory.mktemp("none")), Place("pico", data)).model()
    return model, tokenizer, {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def bench(data, network, tmp_path, monkeypatch):
    """A worker's bench; afterwards its model must be the bare base, bit for bit, as it was loaded."""
    model, tokenizer, before = network
    found = Bench(Store(tmp_path / "study"), Place("pico", data))
    monkeypatch.setattr(found, "_network", model)
    monkeypatch.setattr(found, "_tokenizer", tokenizer)
    yield found
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    # With gradients asked for, products would round otherwise.
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def job(kind, settings, **needs):
    return Job(kind, step(kind).version, f"{kind} it", settings, needs)


def found(bench, one):
    do(one, bench.store, bench)
    return json.loads(json.dumps(bench.store.record(one)))


def editing(method="lora", mode="batch", **more):
    settings = {
        "model": "m",
        "method": METHODS[method],
        "edits": "counterfact.jsonl",
        "limit": 4,
        "mode": mode,
        "edits_per_batch": None,
        "sample": None,
        "steps": None if method == "alphaedit" else 3,
        "lr": None if method == "alphaedit" else 1e-2,
        "rows": None,
        "questions": 5,
        "neighbours": False,
        "drift": None,
        "seed": 7,
    }
    return job("edit", {**settings, **more})


STAGED = {"single": {}, "batch": {"edits_per_batch": 2}, "sequential": {"edits_per_batch": 2, "drift": DRIFT}}


@pytest.mark.parametrize("method", list(METHODS))
def test_a_batch_of_edits_says_what_became_of_each_and_how_far_the_model_drifted(bench, method):
    result = found(bench, editing(method, drift=DRIFT, neighbours=True))["result"]
    (stage,) = result["stages"]
    records, before = stage["records"], result["before"]
    assert records["index"] == [0, 1, 2, 3]
    assert records["log_prob_new"] != before["log_prob_new"]
    success = [new > old or exact for new, old, exact in _outcomes(records)]
    assert [bool(one) for one in records["success"]] == success
    assert result["summary"]["after"]["all"]["success"] == pytest.approx(25 * sum(success))
    assert all(len(kept) > 1 for kept in records["neighbours_kept"])
    assert result["drift"]["prose"]["kl"] > 0
    questions = result["questions"]
    assert {len(column) for column in questions.values()} == {5}
    change = [a - b for a, b in zip(questions["log_prob"], questions["log_prob_before"], strict=True)]
    assert result["summary"]["locality"]["log_prob_change"] == pytest.approx(
        sum(change) / 5, rel=1e-3, abs=1e-4
    )
    assert "seconds" not in json.dumps(result)


def _outcomes(records):
    return zip(records["log_prob_new"], records["log_prob_old"], map(bool, records["exact"]), strict=True)


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("mode", list(STAGED))
def test_edits_killed_between_and_within_stages_end_with_the_same_results(
    bench, tmp_path, monkeypatch, mode, method
):
    one = editing(method, mode, **STAGED[mode])
    expected = found(bench, one)["result"]
    bench.store = Store(tmp_path / "killed")
    kind = AlphaEditor if method == "alphaedit" else AdapterEditor
    teach, taught = kind.teach, []

    def stopped(self, edits):
        took = teach(self, edits)
        taught.append([edit.prompt for edit in edits])
        if len(taught) in (2, 3):  # it had taught the second stage, which is done again
            raise KeyboardInterrupt
        return took

    monkeypatch.setattr(kind, "teach", stopped)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            do(one, bench.store, bench)
    assert found(bench, one)["result"] == expected
    stages = len(expected["stages"])
    assert len(taught) == stages + 2
    assert taught[1] == taught[2] == taught[3]
    assert not bench.store.work(one).exists()


def test_a_sequence_is_measured_after_every_stage_and_its_questions_after_the_last(bench):
    result = found(bench, editing(mode="sequential", edits_per_batch=2))["result"]
    assert [stage["taught"] for stage in result["stages"]] == [[0, 1], [2, 3]]
    assert [stage["records"]["index"] for stage in result["stages"]] == [[0, 1], [0, 1, 2, 3]]
    last = result["stages"][-1]["locality"]
    assert last == result["summary"]["locality"]
    assert sum(result["questions"]["correct"]) * 20 == pytest.approx(last["accuracy"])
    assert result["drift"] is None


def test_edits_that_are_not_there_or_a_setting_without_use_are_told(bench):
    with pytest.raises(ConfigError, match="drift has no use in the mode single"):
        do(editing(mode="single", drift=DRIFT), bench.store, bench)
    with pytest.raises(ConfigError, match="steps has no use with alphaedit"):
        do(editing("alphaedit", steps=3), bench.store, bench)


def probing(**more):
    settings = {
        "model": "m",
        "modules": ["q_proj", "v_proj"],
        "layers": [1],
        "directions": 3,
        "choice": "log",
    }
    settings |= {"basis": "weight", "principal_rank": None, "kinds": ["zero", "noise_0.1"], "draws": 2}
    settings |= {"texts": DRIFT["texts"], "tokens": 64, "seed": 1, "scores": {}}
    return job("probe", {**settings, **more})


@pytest.mark.parametrize("basis", ["weight", "activation"])
def test_a_probe_measures_every_direction_under_every_intervention(bench, basis):
    result = found(bench, probing(basis=basis, principal_rank=8))["result"]
    assert result["modules"] == [f"model.layers.1.self_attn.{name}_proj" for name in "qv"]
    kinds = [record["kind"] for record in result["records"]]
    assert {kind: kinds.count(kind) for kind in kinds} == {"zero": 6, "noise_0.1": 12}
    assert all(record["drop"]["kl"] > 0 for record in result["records"] if record["kind"] == "zero")
    groups = {(row["kind"], row["metric"], row["type"]) for row in result["correlations"]}
    assert len(groups) == 2 * 2 * 3
    whole = next(row for row in result["correlations"] if row["type"] == "all")
    assert whole["points"] == 6
    assert -1 <= whole["pearson"]["estimate"] <= 1


def test_a_probe_scores_tasks_too(bench):
    result = found(bench, probing(kinds=["flip"], directions=1, scores={"mmlu": 4}))["result"]
    (first, _) = (record["drop"] for record in result["records"])
    assert set(first) == {"kl", "log_perplexity", "mmlu", "mmlu likelihood"}
    assert first["mmlu"] in (-100, -75, -50, -25, 0, 25, 50, 75, 100)
    assert first["mmlu likelihood"] != 0


def test_a_killed_probe_goes_on_with_the_next_intervention(bench, tmp_path, monkeypatch):
    expected = found(bench, probing())["result"]
    bench.store = Store(tmp_path / "killed")
    calls, real = [], probe_run.measure_drift

    def stopped(*arguments, **named):
        calls.append(1)
        if len(calls) in (5, 9):
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(probe_run, "measure_drift", stopped)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            do(probing(), bench.store, bench)
    assert found(bench, probing())["result"] == expected
    assert len(calls) == len(expected["records"]) + 2


@pytest.mark.parametrize("basis", ["weight", "activation"])
def test_factors_are_computed_once_and_found_by_the_training_after(bench, basis, monkeypatch, tmp_path):
    monkeypatch.setenv("HIPLORA_CACHE", str(tmp_path / "cache"))
    method = {"name": "proj_lora", "principal_rank": 4, "basis": basis, "r": 2}
    if basis == "activation":
        method |= {"calibration_text": "wikitext2_raw_valid.jsonl", "calibration_tokens": 300}
    first, again = (found(bench, job("factorize", {"method": method, "n": n})) for n in range(2))
    assert first["result"] == again["result"]
    assert (first["timing"]["reused"], again["timing"]["reused"]) == (False, True)
    result = first["result"]
    assert (result["basis"], result["layers"], result["k"]) == (basis, 6, 4)
    assert result["bytes"] == 4 * 2 * 4 * ((64 + 128 + 1) * 3)
    if basis == "weight":
        assert 0 <= result["residual"] < 1e-4
        assert result["energy"] is None
    else:
        assert result["residual"] is None
        assert 0 < result["energy"] <= 1
    folder = tmp_path / "cache" / ("factors" if basis == "weight" else "calibration")
    entries = sorted(folder.rglob("*.safetensors"))
    assert entries
    found(bench, job("train", {"recipe": recipe(method, steps=1)}))
    assert sorted(folder.rglob("*.safetensors")) == entries


def test_the_ranks_of_layers_that_differ_are_listed(bench):
    method = {"name": "proj_lora", "basis": "weight", "principal_rank": 4}
    method["principal_rank_pattern"] = {"down_proj": 2}
    result = found(bench, job("factorize", {"method": method}))["result"]
    assert result["k"] == [4, 4, 2] * 2


def test_a_method_without_factors_is_refused(bench):
    with pytest.raises(ConfigError, match="method lora has no factors"):
        do(job("factorize", {"method": LORA}), bench.store, bench)


def recipe(method, steps=3):
    return {
        "data": {"path": "gsm8k_train.jsonl", "held_out_fraction": 0.2, "held_out_limit": 4},
        "method": method,
        "train": {
            "lr": 1e-2,
            "steps": steps,
            "batch_size": 2,
            "gradient_accumulation": 1,
            "max_length": 128,
        },
        "seed": 42,
    }


def test_an_inspection_tells_the_shares_of_each_module_and_of_all(bench):
    adapter = job("train", {"recipe": recipe(LORA)})
    found(bench, adapter)
    result = found(bench, job("inspect", {"rank": 8}, adapter=adapter))["result"]
    assert len(result["modules"]) == 2 * 4
    row = result["modules"][0]
    assert (row["module"], row["type"]) == ("model.layers.0.self_attn.k_proj", "k_proj")
    assert len(row["sigma"]) == len(row["gains"]) == 8
    assert row["sigma"][0] == float(f"{row['sigma'][0]:.6g}")
    inside = result["energy_inside"]
    assert list(inside) == ["all", "k_proj", "o_proj", "q_proj", "v_proj"]
    energy = sum(row["norm"] ** 2 for row in result["modules"])
    by_hand = sum(row["both"] * row["norm"] ** 2 for row in result["modules"]) / energy
    assert inside["all"] == pytest.approx(by_hand, rel=1e-4)
    assert 0 < inside["all"] < 1


def test_an_inspected_projection_has_nothing_inside(bench):
    method = {"name": "proj_lora", "preset": "paper", "principal_rank": 8, "r": 4}
    adapter = job("train", {"recipe": recipe(method)})
    found(bench, adapter)
    result = found(bench, job("inspect", {"rank": 8}, adapter=adapter))["result"]
    assert result["energy_inside"]["all"] < 1e-6


def test_speed_is_measured_on_the_steady_steps_alone_in_a_process_of_its_own(bench):
    assert step("speed").alone
    record = found(bench, job("speed", {"recipe": recipe(LORA), "warmup": 2, "steps": 4}))
    assert record["result"]["parameters"] == sum(4 * (m + 64) for m in (64, 32, 32, 64)) * 2
    assert 0 < record["result"]["tokens"] <= 256
    timing = record["timing"]
    assert timing["step_seconds_median"] > 0
    assert math.isfinite(timing["tokens_per_second"])
    assert timing["peak_memory_bytes"] > 50 << 20
    assert timing["gpu"] == (torch.cuda.get_device_name() if torch.cuda.is_available() else None)


def test_what_the_gpu_held_after_the_steps_is_told_where_there_is_one(bench, monkeypatch):
    plain = found(bench, job("train", {"recipe": recipe(LORA, steps=2)}))
    assert "reserved_bytes_mean" not in plain["timing"]
    held = iter([100, 300])
    monkeypatch.setattr("hiplora.training.trainer.reserved_bytes", lambda: next(held))
    timing = found(bench, job("train", {"recipe": recipe(LORA, steps=2), "n": 1}))["timing"]
    assert (timing["reserved_bytes_mean"], timing["reserved_bytes_99th"]) == (200, pytest.approx(298))


def test_a_rate_that_diverges_is_a_result_and_another_one_is_chosen(bench):
    recipes = {lr: recipe(LORA) for lr in (1e-3, 1e30)}
    for lr, one in recipes.items():
        one["train"]["lr"] = lr
    good, bad = (
        Job("train", step("train").version, f"train at {lr}", {"recipe": one}) for lr, one in recipes.items()
    )
    assert found(bench, good)["result"]["held_out_after"] > 0
    lost = found(bench, bad)["result"]
    assert list(lost) == ["diverged"]
    assert "train at 1e+30" in lost["diverged"]
    candidates = [{"value": lr, "needs": [name]} for lr, name in ((1e-3, "good"), (1e30, "bad"))]
    asked = {"field": "held_out_after", "prefer": "low", "candidates": candidates}
    chosen = found(bench, job("collect", asked, good=good, bad=bad))["result"]
    assert (chosen["value"], chosen["tried"][1]["mean"]) == (1e-3, None)
    scoring = {"tasks": {"mmlu": 2}, "seed": 0, "drift": None}
    assert found(bench, job("evaluate", scoring, adapter=bad))["result"] == lost
    only = {**asked, "candidates": candidates[1:]}
    with pytest.raises(HipLoraError, match="no candidate has a finite held_out_after"):
        found(bench, job("collect", only, bad=bad))


def test_a_training_that_diverges_where_a_finite_record_was_taken_over_is_an_error(bench):
    """Else its adapter would count as there, empty."""
    settings = recipe(LORA)
    settings["train"]["lr"] = 1e30
    bad = job("train", {"recipe": settings})
    bench.store.finish(bad, {"held_out_after": 1.0}, {}, artifact=False)
    with pytest.raises(HipLoraError, match="the record that was taken over has a finite result"):
        do(bad, bench.store, bench)
    assert not bench.store.has_artifact(bad)
    assert not done(bad, bench.store, for_artifact=True)


def test_a_training_that_diverged_elsewhere_is_not_done_again_for_its_adapter(bench):
    bad = job("train", {"recipe": recipe(LORA)})
    bench.store.finish(bad, {"diverged": "the loss is nan"}, {}, artifact=False)
    assert done(bad, bench.store, for_artifact=True)
