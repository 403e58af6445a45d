"""`hiplora demo` on a tiny model: its numbers are those of the dense updates of the adapters that it keeps."""

import html
import json
from dataclasses import replace

import pytest
import torch

from hiplora import demo as module
from hiplora.adapters import read_update
from hiplora.compare import QUESTIONS
from hiplora.data.texts import drift_texts
from hiplora.demo import DemoSettings, demo, headline, skills, summary
from hiplora.errors import ConfigError
from hiplora.evaluation.drift import cut_windows
from hiplora.trainings import Base
from tests import reference
from tests.calls import watch
from tests.commands import run
from tests.tiny import tiny_llama, tiny_tokenizer

METHODS = {"lora": "LoRA", "hiplora": "HiP-LoRA"}


@pytest.fixture(scope="module")
def settings(tiny_model_dir):
    return DemoSettings(model=str(tiny_model_dir), loss=5.3, steps=20, lr=1e-2, rank=4, principal_rank=8)


@pytest.fixture(scope="module")
def done(settings, tmp_path_factory):
    """A finished demonstration: its results and its folder. A tiny model answers with noise, which need not be long."""
    out = tmp_path_factory.mktemp("done") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ANSWER_TOKENS", 6)
        yield demo(out, settings), out


def test_each_skill_trains_until_its_held_out_loss_is_low_enough(done, settings):
    for record in done[0]["methods"].values():
        for part in record["alone"].values():
            assert part["held_out"]["after"] <= settings.loss < part["held_out"]["before"]
            assert 0 < part["steps"] < settings.steps


@pytest.mark.parametrize("key", METHODS)
@torch.no_grad()
def test_answers_and_drift_are_those_of_the_sum_of_the_two_updates(done, settings, key):
    results, out = done
    record = results["methods"][METHODS[key]]
    assert record["export_error"] < 1e-6
    assert json.loads((out / "adapters" / f"{key}-added" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    summed = tiny_llama()
    for skill in ("shop", "requests"):
        for target, (A, B) in read_update(out / "adapters" / f"{key}-{skill}").factors.items():
            summed.get_submodule(target).weight.data += (B.double() @ A.double()).float()
    for name, windows in cut_windows(tiny_tokenizer(), drift_texts(), 512, 1024).items():
        kl = reference.drift(tiny_llama(), summed, windows)[0]
        assert record["drift"]["added"][name]["kl"] == pytest.approx(kl, rel=1e-3)
    base = Base(settings.model)
    base.model = summed
    assert [row["said"][METHODS[key]] for row in results["others"]] == [
        row["base"] for row in base.answers({}, QUESTIONS, 6)
    ]


def test_the_skills_check_what_they_teach_and_hold_back_other_prompts():
    for skill in skills():
        assert not {row["prompt"] for row in skill.rows("held_out")} & {row["prompt"] for row in skill.rows("train")}
        for row in skill.rows("held_out"):
            assert set(skill.check(row["completion"].strip(), row["completion"]).values()) == {True}
            assert set(skill.check("Of course! Here it is.", row["completion"]).values()) == {False}
    shop, requests = skills()
    wrong = shop.check("Ahoy! 9 days. Fair winds, Finch Lanterns.", shop.rows("held_out")[0]["completion"])
    assert wrong == {"in house style": True, "right": False}
    assert requests.check("{}", requests.rows("held_out")[0]["completion"]) == {"valid JSON": True, "right": False}


def test_results_table_and_page_say_the_same(done):
    results, out = done
    assert json.loads((out / "results.json").read_text()) == results
    table = summary(results)
    assert table.columns.tolist() == ["base model", "LoRA", "HiP-LoRA"]
    for name, counts in results["summary"].items():
        assert counts["others changed"] == sum(row["said"][name] != row["said"]["base"] for row in results["others"])
        rows = [row for skill in results["skills"].values() for row in skill["added"]]
        assert counts["right added"] == sum(all(row["passed"][name].values()) for row in rows)
        assert counts["asked"] == len(rows)
    page = (out / "report.html").read_text()
    assert headline(results) in html.unescape(page)
    assert all(question in page for question in QUESTIONS)


def test_an_unrelated_answer_in_the_shops_words_is_counted_as_spilled(done):
    said = {"base": "Rome.", "LoRA": "Ahoy! Rome.", "HiP-LoRA": "Rome, in Italy."}
    results = {**done[0], "others": [{"prompt": "What is the capital of Italy?", "said": said}]}
    counted = {name: [module._counts(results, name)[f"others {what}"] for what in module.OTHERS] for name in said}
    assert counted == {"base": [0, 0], "LoRA": [1, 1], "HiP-LoRA": [0, 1]}


def test_an_interrupted_demonstration_goes_on_where_it_stopped(done, settings, tmp_path, monkeypatch):
    calls = watch(monkeypatch, module, "_add", 2)
    with pytest.raises(KeyboardInterrupt):
        demo(tmp_path / "out", settings)
    results = demo(tmp_path / "out", settings)
    assert len(calls) == 2 + 1
    assert results["summary"] == done[0]["summary"]
    with pytest.raises(ConfigError, match="--overwrite"):
        demo(done[1], replace(settings, rank=2))


def test_the_command_runs_the_built_in_job(monkeypatch, tmp_path, capsys, done):
    asked = []
    monkeypatch.setattr(module, "demo", lambda out, **options: asked.append(out) or done[0])
    code, out, _ = run(capsys, "demo", "--out", tmp_path / "demo-out")
    assert (code, asked) == (0, [tmp_path / "demo-out"])
    assert headline(done[0]) in out
    assert "hiplora compare" in out.splitlines()[-1]
