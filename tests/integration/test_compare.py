"""`hiplora compare` on a tiny model: its numbers are those of the adapters that it keeps."""

import json
import logging
import shutil
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import JetMoeConfig, MambaConfig, MixtralConfig

from hiplora import trainings as module
from hiplora.adapters import read_update
from hiplora.compare import CompareSettings, compare, method_recipes
from hiplora.compare_report import at_equal_learning, details, headline, next_steps, summary
from hiplora.data.examples import load_data
from hiplora.errors import ConfigError
from hiplora.evaluation.drift import cut_windows
from tests import reference
from tests.calls import watch
from tests.tiny import EOS, tiny_llama, tiny_tokenizer, write_jsonl

ROWS = [{"prompt": f"{a} plus {b} is ", "completion": str(a + b)} for a in range(6) for b in range(5)]
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 6
TITLES = {"lora": "LoRA", "lora-mlp": "LoRA on the MLPs", "hiplora": "HiP-LoRA", "hiplora-paper": "HiP-LoRA (paper)"}


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_model_dir):
    """Arguments of a comparison: model, data, settings."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "drift.txt").write_text(TEXT)
    (folder / "prompts.txt").write_text("\ufeffWhat is it?\n\nWho was there?\n")  # as Windows saves it
    files = {"prompts": str(folder / "prompts.txt"), "drift_text": str(folder / "drift.txt")}
    sizes = {"steps": 6, "lr": 2e-2, "max_length": 64, "rank": 4, "principal_rank": 8, "heldout_fraction": 0.2}
    settings = CompareSettings(methods=tuple(TITLES), **sizes, **files)
    return str(tiny_model_dir), write_jsonl(folder / "rows.jsonl", ROWS), settings


@pytest.fixture(scope="module")
def done(job, tmp_path_factory):
    """A finished comparison: its results and its folder."""
    out = tmp_path_factory.mktemp("done") / "out"
    model, data, settings = job
    return compare(model, data, out, settings), out


def loss_by_hand(model, rows):
    """NLL per response token; the end token is learned too."""
    answers = [(row.prompt, row.response + EOS) for row in rows]
    total = sum(reference.answer_log_prob(model, tiny_tokenizer(), *pair) for pair in answers)
    return -total / sum(len(tiny_tokenizer()(answer)["input_ids"]) for _, answer in answers)


@pytest.mark.parametrize("method", TITLES)
@torch.no_grad()
def test_loss_and_drift_are_those_of_the_adapter_at_each_scale(done, job, method):
    results, out = done
    rows = load_data(method_recipes(*job)["lora"].data).held_out
    (windows,) = cut_windows(tiny_tokenizer(), {"t": TEXT}, 512, 2048).values()
    assert results["base"]["held_out_loss"] == pytest.approx(loss_by_hand(tiny_llama(), rows), abs=1e-4)
    record = results["methods"][TITLES[method]]
    assert [point["scale"] for point in record["scaled"]] == [0.25, 0.5, 0.75, 1.0]
    assert [point["step"] for point in record["trained"]] == [2, 4, 6]
    assert record["trained"][-1]["held_out_loss"] < results["base"]["held_out_loss"]
    for point in (record["scaled"][1], {**record["trained"][-1], "scale": 1.0}):
        model = tiny_llama()  # with the adapter's dense update added, at the scale
        for name, (A, B) in read_update(out / "adapters" / method).factors.items():
            model.get_submodule(name).weight.data += point["scale"] * (B.double() @ A.double()).float()
        assert point["held_out_loss"] == pytest.approx(loss_by_hand(model, rows), abs=1e-4)
        kl, ratio, *_ = reference.drift(tiny_llama(), model, windows)
        (drift,) = point["drift"].values()
        assert drift["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-7)
        assert drift["perplexity_ratio"] == pytest.approx(ratio, rel=1e-4)


def curve(*points):
    drifts = [{"t": {"kl": kl, "greedy_changed": changed}} for _, kl, changed in points]
    return [{"held_out_loss": point[0], "drift": drift} for point, drift in zip(points, drifts, strict=True)]


def equal(**curves):
    return at_equal_learning(2.0, {name: {"trained": a, "scaled": b} for name, (a, b) in curves.items()})


def test_drift_is_read_at_the_lowest_loss_that_all_reach_where_a_curve_first_gets_there():
    fast = curve((1.5, 0.01, 0.1), (1.0, 0.09, 0.3), (1.2, 0.5, 0.9))
    slow = curve((1.8, 0.0004, 0.0), (1.25, 0.0009, 0.1))
    comparison = equal(fast=(fast, curve((1.4, 0.04, 0.2))), slow=(slow, slow))
    assert comparison["loss"] == 1.25
    # Half-way between sqrt(KL) 0.1 and 0.3; the shares changed half-way between 0.1 and 0.3.
    assert comparison["methods"]["fast"]["trained"]["t"] == pytest.approx({"kl": 0.04, "greedy_changed": 0.2})
    assert comparison["methods"]["fast"]["scaled"] is None
    assert comparison["methods"]["slow"]["trained"]["t"] == pytest.approx({"kl": 0.0009, "greedy_changed": 0.1})
    # A curve begins at the base model.
    one, two = curve((1.0, 0.04, 0.4)), curve((1.5, 0.01, 0.1))
    comparison = equal(one=(one, one), two=(two, two))
    assert comparison["methods"]["one"]["trained"]["t"] == pytest.approx({"kl": 0.01, "greedy_changed": 0.2})
    # Where one ends above the base's loss, all are read there.
    worse = curve((2.5, 0.01, 0.1), (2.25, 0.04, 0.4))
    comparison = equal(one=(one, one), worse=(worse, worse))
    assert [reached["trained"]["t"]["kl"] for reached in comparison["methods"].values()] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("base", "lora", "ours", "said"),
    [
        (2.0, (0.4, 0.4), (0.02, 0.02), "20 times as far"),
        (2.0, (0.024, 0.024), (0.02, 0.02), "LoRA drifts 1.2 times as far from the base as HiP-LoRA"),
        (2.0, (0.02, 0.02), (0.024, 0.024), "HiP-LoRA drifts 1.2 times as far from the base as LoRA"),
        (2.0, (0.4, 0.1), (0.02, 0.04), "5 times as far"),  # each at its best: scaled down, or trained just that far
        (2.0, (0.009, 0.009), (0.0009, 0.0009), "train longer"),
        (1.01, (0.4, 0.4), (0.02, 0.02), "too little"),
        (0.9, (0.4, 0.4), (0.02, 0.02), "LoRA and HiP-LoRA learned nothing at this learning rate: lower it (--lr)"),
    ],
)
def test_the_headline_says_what_was_found_in_favour_or_not(base, lora, ours, said):
    methods = {
        name: {"trained": curve((1.0, trained, 0.3)), "scaled": curve((1.0, scaled, 0.1))}
        for name, (trained, scaled) in (("LoRA", lora), ("HiP-LoRA", ours))
    }
    results = {"base": {"held_out_loss": base}, "equal": at_equal_learning(base, methods), "methods": methods}
    assert said in f"{headline(results)} {details(results)}"


def test_methods_train_on_the_same_tokens_and_adapt_the_modules_of_their_name(done):
    results, out = done
    assert len({record["tokens"] for record in results["methods"].values()}) == 1
    mlp, attention = {"gate_proj", "up_proj", "down_proj"}, {"q_proj", "k_proj", "v_proj", "o_proj"}
    for key, expected in zip(TITLES, (mlp | attention, mlp, mlp, attention), strict=True):
        modules = read_update(out / "adapters" / key).modules
        assert {name.rpartition(".")[2] for name in modules} == expected


def test_the_folder_holds_results_answers_a_page_and_adapters_and_is_not_touched_without_overwrite(done, job):
    results, out = done
    model, data, settings = job
    with pytest.raises(ConfigError, match="--overwrite"):
        compare(model, data, out, settings)
    assert json.loads((out / "results.json").read_text()) == results
    answers = results["answers"]
    assert [row["prompt"] for row in answers[-2:]] == ["What is it?", "Who was there?"]
    assert len(answers) == 2 + len(results["expected"]) == 5
    assert list(answers[0]["said"]) == ["base", *TITLES.values()]
    page = (out / "report.html").read_text()
    assert all(text in page for text in ("HiP-LoRA (paper)", "<dt>expected</dt>", "What is it?", "hiplora export"))
    assert summary(results).columns.tolist() == list(TITLES.values())
    assert str(out / "adapters" / "hiplora") in next_steps(results, out)
    assert not list(out.glob("adapters/*/checkpoints"))
    PeftModel.from_pretrained(tiny_llama(), str(out / "adapters" / "hiplora"))


def test_an_interrupted_comparison_goes_on_to_the_same_results(done, job, tmp_path, monkeypatch):
    model, data, settings = job
    calls = watch(monkeypatch, module, "_train", 2)
    with pytest.raises(KeyboardInterrupt):
        compare(model, data, tmp_path / "out", settings)
    assert not (tmp_path / "out" / "results.json").exists()
    results = compare(model, data, tmp_path / "out", settings)
    assert len(calls) == 4 + 1  # what was finished is not trained again
    for title, record in results["methods"].items():
        assert record | {"seconds": 0} == done[0]["methods"][title] | {"seconds": 0}


def test_a_comparison_of_one_model_by_name_is_not_carried_on_with_another(job, tmp_path, monkeypatch):
    model, data, settings = job
    shutil.copytree(model, tmp_path / "other")
    monkeypatch.setattr(module, "folder_identity", lambda model: None)  # as if both were names on the hub
    watch(monkeypatch, module, "_train", 1)
    with pytest.raises(KeyboardInterrupt):
        compare(model, data, tmp_path / "out", settings)
    with pytest.raises(ConfigError, match=rf"other settings \(model: {model} there, .*other here\)"):
        compare(str(tmp_path / "other"), data, tmp_path / "out", settings)


def test_lora_on_experts_is_refused_before_anything_is_trained_and_what_fits_is_the_default(job, tmp_path):
    MixtralConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"method lora: .* lora-attention and hiplora fit; name other --methods"):
        compare(str(tmp_path / "model"), job[1], tmp_path / "out", job[2])
    model, data, unnamed = job[0], job[1], replace(job[2], methods=None)
    assert [*method_recipes(str(tmp_path / "model"), data, unnamed)] == ["lora-attention", "hiplora"]
    assert [*method_recipes(model, data, unnamed)] == ["lora", "lora-mlp", "hiplora"]
    MambaConfig(hidden_size=32, num_hidden_layers=1).save_pretrained(tmp_path / "mamba")
    assert [*method_recipes(str(tmp_path / "mamba"), data, unnamed)] == ["lora", "hiplora"]


@pytest.mark.parametrize("methods", [("lora-mlp",), ("lora", "hiplora")])
def test_a_method_whose_layers_the_model_has_not_is_named_with_the_way_out(job, tmp_path, methods):
    sizes = {"hidden_size": 32, "num_key_value_heads": 2, "kv_channels": 16, "intermediate_size": 48}
    JetMoeConfig(**sizes, num_hidden_layers=1).save_pretrained(tmp_path / "model")  # experts unlike others'
    with pytest.raises(ConfigError, match=rf"method {methods[-1]}: .* recognised in JetMoe.* name other --methods"):
        compare(str(tmp_path / "model"), job[1], tmp_path / "out", replace(job[2], methods=methods))


def test_what_all_trainings_say_of_the_data_is_said_once(caplog):
    with module._notes_once():
        for said in ("3 rows are left out", "3 rows are left out", "stopping"):
            logging.getLogger("hiplora.training").warning(said)
    assert caplog.messages == ["3 rows are left out", "stopping"]
