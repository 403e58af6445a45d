"""`hiplora compare` on a tiny model: its numbers are those of the adapters that it keeps."""

import json
import math
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

from hiplora import compare as module
from hiplora.compare import CompareSettings, check_model, compare, slug, summary
from hiplora.errors import ConfigError, DataError
from hiplora.evaluation.drift import cut_windows
from tests.commands import run
from tests.tiny import tiny_llama, tiny_tokenizer, write_jsonl

ROWS = [{"prompt": f"{a} plus {b} is ", "completion": str(a + b)} for a in range(6) for b in range(5)]
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 6
METHODS = ["LoRA", "LoRA on the MLPs", "HiP-LoRA", "HiP-LoRA (paper)"]
TIMING = ("seconds", "provenance")


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_model_dir):
    """Arguments of a comparison: model, data, settings."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "drift.txt").write_text(TEXT)
    settings = CompareSettings(
        steps=6,
        lr=2e-2,
        batch_size=4,
        max_length=64,
        rank=4,
        principal_rank=8,
        drift_text=str(folder / "drift.txt"),
        heldout_fraction=0.2,
    )
    return str(tiny_model_dir), write_jsonl(folder / "rows.jsonl", ROWS), settings


@pytest.fixture(scope="module")
def done(job, tmp_path_factory):
    """A finished comparison: its results and its folder."""
    out = tmp_path_factory.mktemp("done") / "out"
    model, data, settings = job
    return compare(model, data, out, settings), out


def adapter_model(out, method):
    return PeftModel.from_pretrained(tiny_llama(), str(out / "adapters" / slug(method))).eval()


def timeless(value):
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in TIMING}
    return value


@torch.no_grad()
def loss_by_hand(model, rows):
    """NLL per response token, row by row in float64; the end token is learned too."""
    tokenizer, total, count = tiny_tokenizer(), 0.0, 0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = [*prompt, *tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        total -= sum(log_probs[i - 1, ids[i]].item() for i in range(len(prompt), len(ids)))
        count += len(ids) - len(prompt)
    return total / count


def test_every_method_learns_the_rows_and_the_held_out_loss_is_that_of_its_adapter(done, job):
    results, out = done
    data = module._recipes(*job, check_model(job[0], 8))["LoRA"].data
    from hiplora.data.examples import load_data

    rows = [{"prompt": row.prompt, "completion": row.response} for row in load_data(data).held_out]
    assert len(rows) == results["data"]["held_out_rows"] == 6
    assert list(results["methods"]) == METHODS
    for method, record in results["methods"].items():
        assert record["held_out"]["before"] == pytest.approx(loss_by_hand(tiny_llama(), rows), abs=1e-4)
        assert record["held_out"]["after"] == pytest.approx(loss_by_hand(adapter_model(out, method), rows), abs=1e-4)
        assert record["held_out"]["after"] < record["held_out"]["before"]


@torch.no_grad()
def test_the_drift_is_the_one_of_the_definition(done):
    results, out = done
    (windows,) = cut_windows(tiny_tokenizer(), {"t": TEXT}, 512, 2048).values()
    for method, record in results["methods"].items():
        model, kl, change, count = adapter_model(out, method), 0.0, 0.0, 0
        for ids in windows:
            p, q = (m(ids[None]).logits[0, :-1].double().log_softmax(-1) for m in (tiny_llama(), model))
            kl += (p.exp() * (p - q)).sum().item()
            change += (p - q).gather(1, ids[1:, None]).sum().item()
            count += len(ids) - 1
        (found,) = record["drift"].values()
        assert found["kl"] == pytest.approx(kl / count, rel=1e-3)
        assert found["perplexity_ratio"] == pytest.approx(math.exp(change / count), rel=1e-4)


def test_methods_start_alike_train_on_the_same_tokens_and_adapt_the_modules_of_their_name(done):
    results, out = done
    records = results["methods"]
    assert len({record["tokens"] for record in records.values()}) == 1
    parameters = {method: record["trainable_parameters"] for method, record in records.items()}
    assert parameters["LoRA on the MLPs"] == parameters["HiP-LoRA"]
    assert parameters["HiP-LoRA (paper)"] - parameters["LoRA"] == 8 * 8  # the gains of eight modules
    for method in METHODS:
        config = json.loads((out / "adapters" / slug(method) / "adapter_config.json").read_text())
        mlp = any("down_proj" in name for name in config["target_modules"])
        assert mlp == (method in ("LoRA on the MLPs", "HiP-LoRA"))


def test_answers_stand_side_by_side(done):
    answers = done[0]["answers"]
    assert len(answers) == 5
    assert set(answers[0]) == {"prompt", "expected", "base", *METHODS}


def test_the_folder_holds_results_a_page_and_adapters_and_names_nobodys_folders(done, job, tmp_path_factory):
    results, out = done
    assert json.loads((out / "results.json").read_text()) == results
    page = (out / "report.html").read_text()
    assert "HiP-LoRA (paper)" in page
    assert summary(results)["method"].tolist() == ["base", *METHODS]
    assert results["data"]["file"] == "rows.jsonl"


def test_an_interrupted_comparison_goes_on_to_the_same_results(done, job, tmp_path, monkeypatch):
    model, data, settings = job
    real, calls = module._train, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "_train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(model, data, tmp_path / "out", settings)
    assert not (tmp_path / "out" / "results.json").exists()
    results = compare(model, data, tmp_path / "out", settings)
    assert len(calls) == 4 + 1  # what was finished is not trained again
    assert timeless(results) == timeless(done[0])


def test_a_finished_comparison_is_not_touched_without_overwrite(done, job):
    results, out = done
    model, data, settings = job
    with pytest.raises(ConfigError, match="--overwrite"):
        compare(model, data, out, settings)
    assert json.loads((out / "results.json").read_text()) == results


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"model": "/no/such/model"}, ConfigError, "no such folder"),
        ({"data": "/no/such/rows.jsonl"}, DataError, "no such file"),
        ({"drift_text": "/no/such.txt"}, DataError, "/no/such.txt"),
        ({"steps": 0}, ConfigError, r"setting train\.steps: Input should be greater"),
        ({"lr": math.nan}, ConfigError, r"setting train\.lr"),
        ({"heldout_fraction": 1.0}, ConfigError, r"setting data\.held_out_fraction"),
        (
            {"principal_rank": 32},
            ConfigError,
            r"--principal-rank is 32, but layer .*_proj has only .* 32 direct",
        ),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(job, tmp_path, monkeypatch, change, error, said):
    def never(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", never)
    change = dict(change)
    model, data = change.pop("model", job[0]), change.pop("data", job[1])
    with pytest.raises(error, match=said):
        compare(model, data, tmp_path / "out", replace(job[2], **change))
    assert not (tmp_path / "out").exists()


def test_the_command_prints_json_that_it_also_stores(job, tmp_path, capsys):
    model, data, settings = job
    options = (
        "--steps",
        4,
        "--lr",
        0.01,
        "--rank",
        2,
        "--principal-rank",
        4,
        "--drift-text",
        settings.drift_text,
    )
    code, out, err = run(capsys, "compare", model, data, "--out", tmp_path / "out", *options, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads((tmp_path / "out" / "results.json").read_text())
