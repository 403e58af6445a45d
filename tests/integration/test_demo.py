import inspect
import json
import shlex

import pytest
import torch
from peft import PeftModel

from hiplora.adapters import read_update
from hiplora.cli import main as frame
from hiplora.cli.demo import command
from hiplora.editing import evaluate_edits, load_edit_sets
from hiplora.errors import ConfigError, DataError
from hiplora.study import demo_stages
from hiplora.study.demo import DemoSettings, demo
from hiplora.study.isolated import run_here
from hiplora.study.methods import METHODS, Ranks, slug
from tests.tiny import tiny_llama, tiny_tokenizer, write_jsonl

SETS = ("north", "south")


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
def job(tmp_path_factory, tiny_model_dir):
    file = write_jsonl(
        tmp_path_factory.mktemp("edits") / "edits.jsonl", [edit(name, i) for name in SETS for i in range(3)]
    )
    return DemoSettings(
        model=str(tiny_model_dir),
        edits=str(file),
        steps=25,
        lr=2e-2,
        batch_size=3,
        ranks=Ranks(4, 8, 8, 0.0),
        drift_tokens=96,
    )


@pytest.fixture(scope="module")
def done(job, tmp_path_factory):
    """A finished demonstration: (its results, its folder)."""
    out = tmp_path_factory.mktemp("done") / "out"
    return demo(job, out, isolated=False), out


def with_updates(*folders):
    """The base with the dense updates of some adapters added to its weights."""
    model = tiny_llama()
    for folder in folders:
        for module, (A, B) in read_update(folder).factors.items():
            model.get_submodule(module).weight.data += (B.double() @ A.double()).float()
    return model


@torch.no_grad()
def test_success_alone_and_merged_is_that_of_the_dense_updates(done, job):
    results, out = done
    sets, tokenizer = load_edit_sets(job.edits), tiny_tokenizer()
    for method in METHODS:
        adapters = [out / "adapters" / f"{slug(method)}-{name}" for name in SETS]
        found = results["edits"]["methods"][method]
        merged, survived = with_updates(*adapters), []
        for part, adapter, single in zip(sets, adapters, found["single"], strict=True):
            alone = [o.preferred for o in evaluate_edits(with_updates(adapter), tokenizer, part.edits)]
            after = [o.preferred for o in evaluate_edits(merged, tokenizer, part.edits)]
            assert single["set"] == part.name
            assert single["success"] == pytest.approx(sum(alone) / 3)
            assert found["merged"]["success"][part.name] == pytest.approx(sum(after) / 3)
            survived += [now for before, now in zip(alone, after, strict=True) if before]
        assert found["merged"]["survival"] == pytest.approx(sum(survived) / len(survived))


def test_training_makes_edits_succeed_that_the_base_model_does_not_know(done):
    edits = done[0]["edits"]
    before = sum(edits["base_success"].values()) / 2
    for method in METHODS:
        after = sum(single["success"] for single in edits["methods"][method]["single"]) / 2
        assert after > before


@torch.no_grad()
def test_the_merged_drift_is_that_of_the_summed_updates(done):
    from hiplora.evaluation import drift_texts
    from hiplora.evaluation.drift import cut_windows

    results, out = done
    windows = cut_windows(tiny_tokenizer(), drift_texts(), 512, 96)
    for method in METHODS:
        merged = with_updates(*(out / "adapters" / f"{slug(method)}-{name}" for name in SETS))
        for name, (ids,) in windows.items():
            p, q = (m(ids[None]).logits[0, :-1].double().log_softmax(-1) for m in (tiny_llama(), merged))
            expected = (p.exp() * (p - q)).sum(-1).mean().item()
            found = results["edits"]["methods"][method]["merged"]["drift"][name]
            assert found["kl"] == pytest.approx(expected, rel=1e-3)


def test_the_merged_adapter_and_the_exports_are_plain_lora_and_exact(done):
    results, out = done
    for method, rank in (("LoRA", 8), ("HiP-LoRA", 16), ("HiP-LoRA (activation)", 8)):
        export = results["edits"]["methods"][method]["export"]
        assert export["rank"] == rank
        assert export["max_module_difference"] < 1e-6
        PeftModel.from_pretrained(tiny_llama(), str(out / export["path"]))
        assert json.loads((out / export["path"] / "adapter_config.json").read_text())["peft_type"] == "LORA"
        assert export["max_logit_difference"] < 1e-5
    for adapter in (f"{method}-{name}" for method in ("hip-lora", "hip-lora-activation") for name in SETS):
        exported = read_update(out / "export" / adapter)
        assert exported.kind == "lora"
        own = read_update(out / "adapters" / adapter)
        for module, (A, B) in own.factors.items():
            torch.testing.assert_close(exported.factors[module][1] @ exported.factors[module][0], B @ A)


def test_all_methods_start_at_the_same_loss_and_report_every_step(done):
    for record in done[0]["methods"].values():
        assert len(record["curve"]) == 25
        assert record["heldout_loss_after"] < record["heldout_loss_before"]
        assert "peak_memory_bytes" not in record  # it would be that of both methods in one process
    first, *others = (done[0]["methods"][method]["curve"][0]["loss"] for method in METHODS)
    assert all(other == pytest.approx(first, rel=1e-6) for other in others)


def test_the_seconds_of_every_stage_are_reported(done):
    seconds = done[0]["provenance"]["seconds"]
    assert set(seconds) == {
        "base",
        *(f"{slug(m)}-{stage}-{name}" for m in METHODS for stage in ("train", "measure") for name in SETS),
        *(f"{slug(m)}-merge" for m in METHODS),
        "hip-lora-export",
        "hip-lora-activation-export",
    }
    assert all(value >= 0 for value in seconds.values())


@pytest.mark.parametrize("fails", ["_train", "_merge"])
def test_an_interrupted_demonstration_carries_on_to_the_same_results(done, job, tmp_path, monkeypatch, fails):
    real, calls = getattr(demo_stages._Method, fails), []

    def interrupted(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(demo_stages._Method, fails, interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo(job, tmp_path / "out", isolated=False)
    monkeypatch.setattr(demo_stages._Method, fails, real)
    results = demo(job, tmp_path / "out", isolated=False)
    assert results["edits"] == done[0]["edits"]
    for method in METHODS:
        for key in ("curve", "drift", "allocation", "heldout_loss_before", "heldout_loss_after", "tokens"):
            assert results["methods"][method][key] == done[0]["methods"][method][key]


def test_edits_or_a_model_that_cannot_be_used_are_refused_before_anything_is_written(job, tmp_path):
    one = write_jsonl(tmp_path / "one.jsonl", [edit("north", 0)])
    with pytest.raises(DataError, match="1 sets; the demonstration needs 2"):
        demo(DemoSettings(**{**job.__dict__, "edits": str(one)}), tmp_path / "out")
    with pytest.raises(ConfigError, match="no such folder"):
        demo(DemoSettings(**{**job.__dict__, "model": "/no/such/model"}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def run_as_if_elsewhere(target, arguments):
    """In this process, with what would go to another; test_compare starts others."""
    run_here(target, json.loads(json.dumps(arguments)))


def test_the_example_of_the_help_runs_and_reports(job, tmp_path, monkeypatch, capsys):
    lines = inspect.getdoc(command).splitlines()
    assert lines[-3] == "Example:"
    example = shlex.split(lines[-1])
    assert example[:2] == ["hiplora", "demo"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hiplora.study.demo.DemoSettings", lambda: job)
    monkeypatch.setattr("hiplora.study.demo.run_isolated", run_as_if_elsewhere)
    with pytest.raises(SystemExit) as stop:
        frame.main(example[1:])
    said = capsys.readouterr()
    assert (stop.value.code or 0, said.err) == (0, "")
    assert "hip-lora-merge" in said.out
    assert "Survive the merge" in said.out
    results = json.loads((tmp_path / "demo-out" / "results.json").read_text())
    assert all(record["peak_memory_bytes"] > 100e6 for record in results["methods"].values())
    assert (tmp_path / "demo-out" / "report.html").is_file()
