import inspect
import json
import math
import os
import shlex

import pytest
import torch
from peft import PeftModel
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import hiplora  # noqa: F401 - registers HiP-LoRA
from hiplora.cli import main as frame
from hiplora.cli.compare import command
from hiplora.errors import ConfigError, DataError
from hiplora.evaluation.drift import cut_windows
from hiplora.study import compare as module
from hiplora.study.compare import CompareSettings, compare
from hiplora.study.methods import METHODS, slug
from tests.tiny import tiny_llama, tiny_tokenizer, write_jsonl

ROWS = [{"prompt": f"{a} plus {b} is ", "completion": str(a + b)} for a in range(6) for b in range(5)]
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 6
TIMING = ("seconds", "peak_memory_bytes")


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_model_dir):
    folder = tmp_path_factory.mktemp("compare")
    (folder / "drift.txt").write_text(TEXT)
    return CompareSettings(
        model=str(tiny_model_dir),
        data=str(write_jsonl(folder / "rows.jsonl", ROWS)),
        steps=6,
        lr=2e-2,
        batch_size=4,
        max_length=64,
        rank=4,
        principal_rank=8,
        drift_text=str(folder / "drift.txt"),
        heldout_fraction=0.2,
    )


@pytest.fixture(scope="module")
def done(job, tmp_path_factory):
    """A finished comparison: (its results, its folder)."""
    out = tmp_path_factory.mktemp("done") / "out"
    return compare(job, out, isolated=False), out


def timeless(results):
    """What must be the same in two runs of one comparison."""
    kept = {key: value for key, value in results.items() if key not in ("created", "provenance")}
    kept["methods"] = {
        name: {key: value for key, value in record.items() if key not in TIMING}
        for name, record in results["methods"].items()
    }
    return kept


def adapter_model(folder):
    return PeftModel.from_pretrained(tiny_llama(), str(folder)).eval()


def by_hand(model, rows):
    """NLL per response token, each row by itself with all logits in float64; the end token is learned too."""
    tokenizer, total, count = tiny_tokenizer(), 0.0, 0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = [*prompt, *tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        total -= sum(log_probs[i - 1, ids[i]].item() for i in range(len(prompt), len(ids)))
        count += len(ids) - len(prompt)
    return total / count


@torch.no_grad()
def test_the_held_out_loss_is_the_one_computed_row_by_row(done):
    results, out = done
    rows = [json.loads(line) for line in (out / "data" / "heldout.jsonl").read_text().splitlines()]
    assert len(rows) == results["data"]["heldout_examples"] == 6
    for method, record in results["methods"].items():
        model = adapter_model(out / "adapters" / slug(method))
        assert record["heldout_loss_before"] == pytest.approx(by_hand(tiny_llama(), rows), abs=1e-5)
        assert record["heldout_loss_after"] == pytest.approx(by_hand(model, rows), abs=1e-5)
        assert record["heldout_loss_after"] < record["heldout_loss_before"]


@torch.no_grad()
def test_the_drift_is_the_one_of_the_definition(done):
    results, out = done
    (windows,) = cut_windows(tiny_tokenizer(), {"t": TEXT}, 512, 2048).values()
    for method, record in results["methods"].items():
        model, kl, change, count = adapter_model(out / "adapters" / slug(method)), 0.0, 0.0, 0
        for ids in windows:
            p, q = (m(ids[None]).logits[0, :-1].double().log_softmax(-1) for m in (tiny_llama(), model))
            kl += (p.exp() * (p - q)).sum().item()
            change += (p - q).gather(1, ids[1:, None]).sum().item()
            count += len(ids) - 1
        (found,) = record["drift"].values()
        assert found["tokens"] == count
        assert found["kl"] == pytest.approx(kl / count, rel=1e-3)
        assert found["perplexity_ratio"] == pytest.approx(math.exp(change / count), rel=1e-5)


@torch.no_grad()
def test_the_allocation_is_the_one_of_the_dense_update(done):
    results, out = done
    for method, record in results["methods"].items():
        model = adapter_model(out / "adapters" / slug(method))
        assert len(record["allocation"]) == 8
        for row in record["allocation"]:
            layer = model.base_model.model.get_submodule(row["module"])
            update = layer.get_delta_weight("default").double()
            U, S, Vh = torch.linalg.svd(layer.weight.double())
            U, V = U[:, :8], Vh[:8].T
            energy = update.square().sum()
            assert row["norm"] == pytest.approx(energy.sqrt().item(), rel=1e-5)
            assert row["left"] == pytest.approx(((U.T @ update).square().sum() / energy).item(), abs=1e-5)
            assert row["right"] == pytest.approx(((update @ V).square().sum() / energy).item(), abs=1e-5)
            assert row["both"] == pytest.approx(((U.T @ update @ V).square().sum() / energy).item(), abs=1e-5)
            torch.testing.assert_close(torch.tensor(row["sigma"]).double(), S[:8], rtol=1e-4, atol=0)
            torch.testing.assert_close(
                torch.tensor(row["gains"]).double(), (U.T @ update @ V).diagonal(), rtol=1e-3, atol=1e-5
            )


def test_only_the_weight_basis_keeps_the_residual_out_of_the_weights_own_directions(done):
    for method, record in done[0]["methods"].items():
        for row in record["allocation"]:
            crossing = row["left"] + row["right"] - 2 * row["both"]
            assert crossing < 1e-6 if method == "HiP-LoRA" else crossing > 1e-3


def test_all_methods_have_the_same_budget_and_the_mismatch_is_said(done, job):
    results, _ = done
    lora, *others = (results["methods"][method] for method in METHODS)
    assert len(others) == 2
    for hip in others:
        assert lora["tokens"] == hip["tokens"]
        assert (
            [point["step"] for point in lora["curve"]]
            == [point["step"] for point in hip["curve"]]
            == [*range(1, 7)]
        )
        # The same first rows, and all start at the base.
        assert lora["curve"][0]["loss"] == hip["curve"][0]["loss"]
        gains = 8 * 8 if hip is others[0] else 0
        assert (lora["trainable_parameters"], hip["trainable_parameters"]) == (3584, 3584 + gains)
    assert any("+1.79 %" in note for note in results["notes"])
    assert all(results["settings"][method]["steps"] == job.steps for method in METHODS)


def test_the_folder_holds_what_the_help_says_and_names_nobodys_folders(done, tmp_path_factory):
    results, out = done
    assert json.loads((out / "results.json").read_text()) == results
    assert "HiP-LoRA" in (out / "report.html").read_text()
    assert list((out / "figures").glob("*.svg"))
    text = json.dumps({key: value for key, value in results.items() if key != "model"})
    assert str(tmp_path_factory.getbasetemp()) not in text
    assert results["data"]["source"] == "rows.jsonl"


@pytest.mark.parametrize("fails", ["train_method", "measure_methods"])
def test_an_interrupted_comparison_carries_on_to_the_same_results(done, job, tmp_path, monkeypatch, fails):
    finished, real, calls = done[0], getattr(module, fails), []

    def interrupted(**arguments):
        calls.append(arguments)
        if len(calls) == (2 if fails == "train_method" else 1):
            raise KeyboardInterrupt
        real(**arguments)

    monkeypatch.setattr(module, fails, interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(job, tmp_path / "out", isolated=False)
    assert not (tmp_path / "out" / "results.json").exists()
    monkeypatch.setattr(module, fails, real)
    kept = (tmp_path / "out" / "stages" / "train-lora.json").stat().st_mtime_ns
    results = compare(job, tmp_path / "out", isolated=False)
    assert (tmp_path / "out" / "stages" / "train-lora.json").stat().st_mtime_ns == kept
    assert timeless(results) == timeless(finished)


def test_a_finished_comparison_is_not_touched_without_overwrite(done, job):
    results, out = done
    with pytest.raises(ConfigError, match=r"finished study.*--overwrite"):
        compare(job, out, isolated=False)
    assert json.loads((out / "results.json").read_text()) == results


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"model": "/no/such/model"}, ConfigError, "no such folder"),
        ({"data": "/no/such/rows.jsonl"}, DataError, "no such file"),
        ({"drift_text": "/no/such.txt"}, DataError, "--drift-text"),
        (
            {"principal_rank": 32},
            ConfigError,
            r"--principal-rank is 32, but layer .*k_proj has only .* 32 direct",
        ),
        ({"max_length": 4}, DataError, "none of the .* rows has room"),
    ],
)
def test_what_is_wrong_is_found_before_a_model_is_loaded(job, tmp_path, monkeypatch, change, error, said):
    def never(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", never)
    with pytest.raises(error, match=said):
        compare(CompareSettings(**{**job.__dict__, **change}), tmp_path / "out", isolated=False)
    assert not (tmp_path / "out").exists()


def test_a_model_without_the_projections_is_refused(tmp_path, job):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=259)).save_pretrained(
        tmp_path / "gpt2"
    )
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ConfigError, match="no modules named q_proj"):
        compare(CompareSettings(**{**job.__dict__, "model": str(tmp_path / "gpt2")}), tmp_path / "out")


def test_drift_text_that_was_trained_on_is_noted(job, tmp_path):
    text = tmp_path / "seen.txt"
    text.write_text(
        "".join(f"{i} is a number that comes after {i - 1}, and before {i + 1}. " for i in range(60))
    )
    data = write_jsonl(
        tmp_path / "rows.jsonl", [{"text": text.read_text()}, {"text": "Other."}, {"text": "More."}]
    )
    changed = {
        **job.__dict__,
        "drift_text": str(text),
        "data": str(data),
        "heldout_fraction": 0.3,
        "steps": 1,
    }
    notes = []
    from hiplora.study.data import split_data
    from hiplora.study.preflight import check_inputs

    split = split_data(data, 0.3)
    if {"text": text.read_text()} in split.heldout:
        split = type(split)(split.shape, split.heldout, split.train, split.source, split.sha256)
    notes = check_inputs(changed["model"], split, {"seen.txt": text.read_text()}, 8, 4096)
    assert any("stands in the training data" in note for note in notes)


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        frame.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return stop.value.code or 0, said.out, said.err


def save_wide(path):
    """A tiny model whose every projection has more than 32 directions, the default of --principal-rank."""
    config = tiny_llama().config
    config.num_key_value_heads = config.num_attention_heads
    LlamaForCausalLM(config).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)


def test_the_example_of_the_help_runs_each_training_in_a_process_of_its_own(tmp_path, monkeypatch, capsys):
    lines = inspect.getdoc(command).splitlines()
    assert lines[-3] == "Example:"
    example = shlex.split(lines[-1])
    assert example[:2] == ["hiplora", "compare"]
    monkeypatch.chdir(tmp_path)
    save_wide(tmp_path / "smollm2-135m")
    write_jsonl(tmp_path / "my-data.jsonl", ROWS)
    capsys.readouterr()
    code, out, err = run(capsys, *example[1:], "--json")
    assert (code, err) == (0, ""), err
    results = json.loads(out)
    assert results == json.loads((tmp_path / "runs" / "compare" / "results.json").read_text())
    assert len(results["methods"]["LoRA"]["curve"]) == 100
    peaks = [record["peak_memory_bytes"] for record in results["methods"].values()]
    assert all(100e6 < peak < 4e9 for peak in peaks)
    assert list(results["methods"]["LoRA"]["drift"]) == ["prose", "python code"]
    code, _, err = run(capsys, *example[1:])
    assert code == 2
    assert "finished study" in err


def test_wrong_usage_is_one_line_and_status_2(tiny_model_dir, tmp_path, capsys):
    code, out, err = run(
        capsys, "compare", tiny_model_dir, tmp_path / "none.jsonl", "--out", tmp_path / "out", "--steps", 5
    )
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    assert not os.path.exists(tmp_path / "out")
