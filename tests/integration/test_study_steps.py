"""The steps of a study on the smallest model: their results, and a base left as it was."""

import json
import math

import pytest
import torch

from hiplora.study.context import Context, Place
from hiplora.study.execute import run_job
from hiplora.study.jobs import KINDS, Job
from hiplora.study.pico import PICO_DATA

pytestmark = pytest.mark.slow

DRIFT = {"texts": {"prose": "wikitext2_raw_valid.jsonl"}, "tokens": 64, "window": 64}
LORA = {"name": "lora", "r": 4, "lora_alpha": 8}
ALPHAEDIT = {"calibration_tokens": 300, "value_steps": 3, "prefixes": 1, "prefix_tokens": 3, "ridge": 1e-3}
METHODS = {
    "pissa": {"r": 4, "lora_alpha": 4},
    "hiplora": {"r": 4, "principal_rank": 4, "calibration_tokens": 300},
    "alphaedit": {**ALPHAEDIT, "threshold": 0.4},
    "crispedit": {"calibration_tokens": 300},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """One pico for all contexts, and its bits."""
    model, tokenizer = Context(Place(tmp_path_factory.mktemp("store"), "pico")).model()
    return (model, tokenizer), {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def context(base, tmp_path, monkeypatch):
    """A worker's context; afterwards its model must be the bare base, bit for bit."""
    (model, tokenizer), before = base
    found = Context(Place(tmp_path / "study", "pico", PICO_DATA))
    monkeypatch.setattr(found, "_model", (model, tokenizer))
    yield found
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def job(kind, settings, name="", **needs):
    return Job(kind, KINDS[kind].version, name or f"{kind} it", settings, needs)


def found(context, one):
    if run_job(one, context) == "failed":
        pytest.fail(context.store.failure(one)["traceback"])
    return json.loads(json.dumps(context.store.record(one)))


def recipe(method, lr=1e-2, steps=3):
    sizes = {"batch_size": 2, "gradient_accumulation": 1, "max_length": 128}
    return {
        "data": {"path": "gsm8k_train.jsonl", "held_out_fraction": 0.2, "held_out_limit": 4},
        "method": method,
        "train": {"lr": lr, "steps": steps, **sizes},
        "seed": 42,
    }


@pytest.mark.parametrize("method", list(METHODS))
def test_an_edit_job_measures_each_edit_and_the_drift(context, method):
    trained = {} if method == "alphaedit" else {"steps": 3, "lr": 1e-2}
    asked = {"method": {"name": method, **METHODS[method]}, "edits": "counterfact.jsonl", "limit": 4, "mode": "batch"}
    asked |= {"questions": 5, "neighbours": True, "drift": DRIFT, "seed": 7, **trained}
    result = found(context, job("edit", asked))["result"]
    (stage,) = result["stages"]
    records, before = stage["records"], result["before"]
    assert records["index"] == [0, 1, 2, 3]
    assert records["log_prob_new"] != before["log_prob_new"]
    assert result["summary"]["after"]["all"]["success"] == pytest.approx(25 * sum(records["success"]))
    assert all(len(kept) > 1 for kept in records["neighbours_kept"])
    assert result["drift"]["prose"]["kl"] > 0
    assert {len(column) for column in result["questions"].values()} == {5}
    assert "seconds" not in json.dumps(result)


def test_a_probe_measures_every_direction(context):
    settings = {"modules": ["q_proj", "v_proj"], "layers": [1], "directions": 3, "kinds": ["zero", "noise_0.1"]}
    settings |= {"choice": "log", "basis": "weight", "draws": 2, "texts": DRIFT["texts"], "tokens": 64, "seed": 1}
    result = found(context, job("probe", settings))["result"]
    assert result["modules"] == [f"model.layers.1.self_attn.{name}_proj" for name in "qv"]
    kinds = [record["kind"] for record in result["records"]]
    assert {kind: kinds.count(kind) for kind in kinds} == {"zero": 6, "noise_0.1": 12}
    assert all(record["drop"]["kl"] > 0 for record in result["records"] if record["kind"] == "zero")


@pytest.mark.parametrize("basis", ["weight", "activation"])
def test_factors_are_computed_once_and_found_by_the_training_after(context, basis, monkeypatch, tmp_path):
    monkeypatch.setenv("HIPLORA_CACHE", str(tmp_path / "cache"))
    method = {"name": "proj_lora", "principal_rank": 4, "basis": basis, "r": 2}
    if basis == "activation":
        method |= {"calibration_text": "wikitext2_raw_valid.jsonl", "calibration_tokens": 300}
    first, again = (found(context, job("factorize", {"method": method, "n": n})) for n in range(2))
    assert first["result"] == again["result"]
    assert (first["timing"]["reused"], again["timing"]["reused"]) == (False, True)
    result = first["result"]
    assert (result["basis"], result["layers"], result["k"]) == (basis, 6, 4)
    assert result["bytes"] == 4 * 2 * 4 * ((64 + 128 + 1) * 3)
    assert result["residual" if basis == "activation" else "energy"] is None

    def entries():
        return sorted(p for p in (tmp_path / "cache").rglob("*.safetensors") if "models" not in p.parts)

    kept = entries()
    assert kept
    found(context, job("train", {"recipe": recipe(method, steps=1)}))
    assert entries() == kept


def test_an_adapter_is_scored_merged_and_inspected(context):
    projected = {"name": "proj_lora", "preset": "paper", "principal_rank": 8, "r": 4}
    adapters = {name: job("train", {"recipe": recipe(m)}) for name, m in (("a", LORA), ("b", projected))}
    for one in adapters.values():
        assert found(context, one)["result"]["held_out_after"] > 0
    scoring = {"tasks": {"mmlu": 4}, "seed": 0, "drift": DRIFT}
    bare = found(context, job("evaluate", scoring))["result"]
    alone = found(context, job("evaluate", scoring, adapter=adapters["a"]))["result"]
    merged = found(context, job("merge", {**scoring, "rule": "addition", "options": {}}, **adapters))["result"]
    assert bare["drift"] is None
    assert min(alone["drift"]["prose"]["kl"], merged["drift"]["prose"]["kl"]) > 0
    likelihoods = [one["tasks"]["mmlu"]["likelihood"] for one in (bare, alone, merged)]
    assert [len(values) for values in likelihoods] == [4, 4, 4]
    assert likelihoods[0] != likelihoods[1] != likelihoods[2]
    inspections = [job("inspect", {"rank": 8}, adapter=one) for one in adapters.values()]
    free, inside = (found(context, one)["result"]["energy_inside"] for one in inspections)
    assert list(free) == ["all", "k_proj", "o_proj", "q_proj", "v_proj"]
    assert inside["all"] < 1e-6 < free["all"] < 1


def test_speed_is_measured_in_a_process_of_its_own(context):
    assert KINDS["speed"].alone
    record = found(context, job("speed", {"recipe": recipe(LORA), "warmup": 2, "steps": 4}))
    assert record["result"]["parameters"] == sum(4 * (m + 64) for m in (64, 32, 32, 64)) * 2
    assert 0 < record["result"]["tokens"] <= 256
    timing = record["timing"]
    assert timing["step_seconds_median"] > 0
    assert math.isfinite(timing["tokens_per_second"])
    assert timing["peak_memory_bytes"] > 50 << 20


def test_a_rate_that_diverges_is_a_result_and_another_one_is_chosen(context):
    good, bad = (job("train", {"recipe": recipe(LORA, lr)}, f"train at {lr}") for lr in (1e-3, 1e30))
    assert found(context, good)["result"]["held_out_after"] > 0
    lost = found(context, bad)["result"]
    assert list(lost) == ["diverged"]
    assert "train at 1e+30" in lost["diverged"]
    candidates = [{"value": lr, "needs": [name]} for lr, name in ((1e-3, "good"), (1e30, "bad"))]
    asked = {"field": "held_out_after", "candidates": candidates}
    chosen = found(context, job("collect", asked, good=good, bad=bad))["result"]
    assert (chosen["value"], chosen["tried"][1]["mean"]) == (1e-3, None)
    context.store.finish(other := job("train", {"recipe": recipe(LORA, 2e30)}), {"held_out_after": 1.0}, {}, False)
    assert run_job(other, context) == "failed"
    assert "the reused record, of another machine, has a finite result" in context.store.failure(other)["error"]
    assert not context.store.readable(other)
