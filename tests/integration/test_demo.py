"""`hiplora demo` on a tiny model: its numbers are those of the dense updates of the adapters that it keeps."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

from hiplora import demo as module
from hiplora.adapters import read_update
from hiplora.cli import demo as command
from hiplora.compare import slug
from hiplora.data.texts import drift_texts
from hiplora.demo import DemoSettings, demo, summary, survival
from hiplora.editing import evaluate_edits, load_edit_sets
from hiplora.errors import ConfigError, DataError
from hiplora.evaluation.drift import cut_windows
from tests.commands import run
from tests.tiny import tiny_llama, tiny_tokenizer, write_jsonl

SETS = ("north", "south")
METHODS = ["LoRA", "LoRA on the MLPs", "HiP-LoRA", "HiP-LoRA (paper)"]


def edit(name, i):
    return {
        "set": name,
        "category": "Entity/Attribute",
        "subject": f"thing {name} {i}",
        "prompt": f"{name} {i} is",
        "paraphrase": f"And {i} of {name}:",
        "old": ("cyan", "lime", "gold")[i],
        "new": ("blue", "pink", "grey")[i],
    }


@pytest.fixture(scope="module")
def settings(tmp_path_factory, tiny_model_dir):
    rows = [edit(name, i) for name in SETS for i in range(3)]
    edits = write_jsonl(tmp_path_factory.mktemp("edits") / "edits.jsonl", rows)
    small = {"steps": 25, "lr": 2e-2, "batch_size": 3, "rank": 4, "principal_rank": 8, "drift_tokens": 96}
    return DemoSettings(model=str(tiny_model_dir), edits=str(edits), **small)


@pytest.fixture(scope="module")
def done(settings, tmp_path_factory):
    """A finished demonstration: its results and its folder."""
    out = tmp_path_factory.mktemp("done") / "out"
    return demo(out, settings), out


def with_updates(out, method, names):
    """The base model with the dense updates of a method's adapters added to its weights."""
    model = tiny_llama()
    for name in names:
        for target, (A, B) in read_update(out / "adapters" / f"{slug(method)}-{name}").factors.items():
            model.get_submodule(target).weight.data += (B.double() @ A.double()).float()
    return model


def works(model, part):
    return (evaluate_edits(model, tiny_tokenizer(), part.edits)["preferred"] == 1).tolist()


def test_success_alone_and_merged_is_that_of_the_dense_updates(done, settings):
    results, out = done
    sets = load_edit_sets(settings.edits)
    assert list(results["methods"]) == METHODS
    for method, record in results["methods"].items():
        merged = with_updates(out, method, SETS)
        for part, alone in zip(sets, record["alone"], strict=True):
            assert alone["success"][part.name]["works"] == works(with_updates(out, method, [part.name]), part)
            assert record["merged"]["success"][part.name]["works"] == works(merged, part)


@torch.no_grad()
def test_the_merged_drift_is_that_of_the_summed_updates(done):
    results, out = done
    windows = cut_windows(tiny_tokenizer(), drift_texts(), 512, 96)
    for method, record in results["methods"].items():
        merged = with_updates(out, method, SETS)
        for name, (ids,) in windows.items():
            p, q = (m(ids[None]).logits[0, :-1].double().log_softmax(-1) for m in (tiny_llama(), merged))
            expected = (p.exp() * (p - q)).sum(-1).mean().item()
            assert record["merged"]["drift"][name]["kl"] == pytest.approx(expected, rel=1e-3)


def test_the_merged_adapters_are_plain_lora_and_exact(done):
    results, out = done
    for method, rank in zip(METHODS, (8, 8, 8, 16), strict=True):
        assert results["methods"][method]["merged"]["rank"] == rank
        assert results["methods"][method]["merged"]["export_error"] < 1e-6
        folder = out / "adapters" / f"{slug(method)}-merged"
        assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
        PeftModel.from_pretrained(tiny_llama(), str(folder))


def test_the_summary_has_a_row_a_method_and_the_page_is_written(done):
    results, out = done
    table = summary(results)
    assert table["method"].tolist() == ["base", *METHODS]
    assert table["edits that work alone"].str.endswith("of 6").all()
    assert json.loads((out / "results.json").read_text()) == results
    assert "HiP-LoRA (paper)" in (out / "report.html").read_text()


def test_survival_counts_only_edits_that_worked_alone():
    before = {"a": {"works": [True, True, False]}}
    assert survival(before, {"a": {"works": [True, False, True]}}) == 0.5


def test_an_interrupted_demonstration_goes_on_where_it_stopped(done, settings, tmp_path, monkeypatch):
    real, calls = module._merge, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "_merge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo(tmp_path / "out", settings)
    results = demo(tmp_path / "out", settings)
    assert len(calls) == 4 + 1
    merged = [{name: found["merged"] for name, found in result["methods"].items()} for result in (results, done[0])]
    assert merged[0] == merged[1]


def test_other_settings_and_other_numbers_of_sets_are_refused(done, settings, tmp_path):
    with pytest.raises(ConfigError, match="--overwrite"):
        demo(done[1], settings)
    one = write_jsonl(tmp_path / "one.jsonl", [edit("north", 0)])
    with pytest.raises(DataError, match="1 sets"):
        demo(tmp_path / "out", replace(settings, edits=str(one)))
    assert not (tmp_path / "out").exists()


def test_the_command_runs_the_built_in_job(monkeypatch, tmp_path, capsys, done):
    asked = []
    monkeypatch.setattr(module, "demo", lambda out, **options: asked.append((out, options)) or done[0])
    code, out, _ = run(capsys, "demo", "--out", tmp_path / "demo-out")
    assert code == 0
    assert asked == [(tmp_path / "demo-out", {"overwrite": False})]
    assert "HiP-LoRA (paper)" in out
    assert "report.html" in out
    assert command.command.__doc__.strip().endswith("hiplora demo --out demo-out")
