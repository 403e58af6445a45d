"""The steps of a study on the smallest model: their results, and a base left as it was."""

import json
import math

import pytest
import torch

from hiplora.study.execute import run_job
from hiplora.study.jobs import KINDS, Job
from hiplora.study.pico import PICO_DATA
from hiplora.study.steps import Context
from hiplora.study.store import Place

pytestmark = pytest.mark.slow
LORA = {"name": "lora", "r": 4, "lora_alpha": 8}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """One pico for all contexts, and its bits."""
    model, tokenizer = Context(Place(tmp_path_factory.mktemp("store"), "pico")).model()
    return (model, tokenizer), {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def context(base, tmp_path, monkeypatch):
    """A worker's context; afterwards its model must be the bare base, bit for bit."""
    (model, tokenizer), before = base
    worker = Context(Place(tmp_path / "study", "pico", PICO_DATA))
    monkeypatch.setattr(worker, "_model", (model, tokenizer))
    yield worker
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def job(kind, settings, name="", **needs):
    return Job(kind, KINDS[kind].version, name or f"{kind} it", settings, needs)


def record_of(context, one):
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


@pytest.mark.parametrize("basis", ["weight", "activation"])
def test_factors_are_computed_once_and_found_by_the_training_after(context, basis, monkeypatch, tmp_path):
    monkeypatch.setenv("HIPLORA_CACHE", str(tmp_path / "cache"))
    method = {"name": "proj_lora", "principal_rank": 4, "basis": basis, "r": 2}
    if basis == "activation":
        method |= {"calibration_text": "wikitext2_raw_valid.jsonl", "calibration_tokens": 300}
    first, again = (record_of(context, job("factorize", {"method": method, "n": n})) for n in range(2))
    assert first["result"] == again["result"]
    assert (first["timing"]["reused"], again["timing"]["reused"]) == (False, True)
    result = first["result"]
    assert (result["basis"], result["layers"], result["k"]) == (basis, 6, 4)
    assert result["bytes"] == 4 * 2 * 4 * ((64 + 128 + 1) * 3)
    assert result["residual" if basis == "activation" else "energy"] is None

    def entries():
        return sorted(p for p in (tmp_path / "cache").rglob("*.safetensors") if "models" not in p.parts)

    before = entries()
    assert before
    record_of(context, job("train", {"recipe": recipe(method, steps=1)}))
    assert entries() == before


def test_speed_is_measured_in_a_process_of_its_own(context):
    assert KINDS["speed"].alone
    record = record_of(context, job("speed", {"recipe": recipe(LORA), "warmup": 2, "steps": 4}))
    assert record["result"]["parameters"] == sum(4 * (m + 64) for m in (64, 32, 32, 64)) * 2
    timing = record["timing"]
    assert timing["step_seconds_median"] > 0
    assert math.isfinite(timing["tokens_per_second"])
    assert timing["peak_memory_bytes"] > 50 << 20


def test_a_rate_that_diverges_is_a_result_and_another_one_is_chosen(context):
    good, bad = (job("train", {"recipe": recipe(LORA, lr)}, f"train at {lr}") for lr in (1e-3, 1e30))
    assert record_of(context, good)["result"]["held_out_after"] > 0
    lost = record_of(context, bad)["result"]
    assert list(lost) == ["diverged"]
    assert "train at 1e+30" in lost["diverged"]
    candidates = [{"value": lr, "needs": [name]} for lr, name in ((1e-3, "good"), (1e30, "bad"))]
    asked = {"field": "held_out_after", "candidates": candidates}
    chosen = record_of(context, job("collect", asked, good=good, bad=bad))["result"]
    assert (chosen["value"], chosen["tried"][1]["mean"]) == (1e-3, None)
    context.store.finish(other := job("train", {"recipe": recipe(LORA, 2e30)}), {"held_out_after": 1.0}, {}, False)
    assert run_job(other, context) == "failed"
    assert "the reused record, of another machine, has a finite result" in context.store.failure(other)["error"]
    assert not context.store.readable(other)
