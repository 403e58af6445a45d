"""`train`: every method from a recipe to an adapter that loads; a resumed run equals the whole one to the bit."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hiplora.errors import ConfigError, DataError, HipLoraError
from hiplora.provenance import file_sha256
from hiplora.training import TrainResult, moved_starts, train
from hiplora.training.recipe import TrainRecipe
from hiplora.training.result import read_metrics
from tests.tiny import tiny_llama, write_jsonl

METHODS = {
    "hiplora": {"name": "hiplora", "principal_rank": 8},
    "proj_lora": {"name": "proj_lora", "principal_rank": 8},
    "activation": {"name": "hiplora", "principal_rank": 8, "basis": "activation"},
    "lora": {"name": "lora"},
    "pissa": {"name": "pissa"},
    "milora": {"name": "milora"},
    "corda": {"name": "corda", "calibration_tokens": 1024},
    "lora_null": {"name": "lora_null", "calibration_tokens": 1024},
    "split_lora": {"name": "split_lora", "clients": 2, "cut_layer": 1, "average_every": 2},
}
SETTINGS = {
    "steps": 8,
    "batch_size": 2,
    "gradient_accumulation": 2,
    "max_length": 160,
    "lr": 1e-2,
    "dtype": "fp32",
    "save_every": 3,
    "log_every": 2,
}


MOVED = ("pissa", "milora", "corda", "lora_null")  # these move the base weights at their start


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    return write_jsonl(
        path, [{"instruction": f"Say {n}", "output": f"{n} it is" * (1 + n % 3)} for n in range(30)]
    )


@pytest.fixture
def make(tiny_model_dir, rows):
    def recipe(method="lora", data=None, **settings):
        return TrainRecipe.model_validate(
            {
                "model": str(tiny_model_dir),
                "data": {"path": rows, "held_out_fraction": 0.2, **(data or {})},
                "method": METHODS[method] if isinstance(method, str) else method,
                "train": {**SETTINGS, **settings},
            }
        )

    return recipe


class Stopped(Exception):
    pass


def stop_at(step):
    def on_step(row):
        if row["step"] == step:
            raise Stopped

    return on_step


def numbers(rows):
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def logits(model):
    ids = torch.arange(40)[None] * 5 % 250
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_and_its_folder_is_complete(make, tmp_path, rows, method):
    result = train(make(method), tmp_path / "out")
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoints",
        "metrics.jsonl",
        "provenance.json",
        "recipe.yaml",
    ]
    assert read_metrics(out) == result.metrics
    assert [row["step"] for row in result.metrics] == [0, 2, 4, 6, 8]
    assert result.held_out["after"] < result.held_out["before"]
    assert result.metrics[-1]["loss"] < result.metrics[1]["loss"]
    stored = json.loads((out / "provenance.json").read_text())
    assert stored["data"]["train"]["sha256"] == file_sha256(rows)
    assert (stored["seed"], stored["recipe"]["method"]["name"]) == (42, METHODS[method]["name"])
    assert {"commit", "libraries", "machine", "recipe_sha256"} <= stored.keys()
    assert TrainResult.read(out) == result
    assert [path.name for path in (out / "checkpoints").glob("step-*")] == ["step-8"]


@pytest.mark.parametrize("method", METHODS)
def test_the_adapter_on_the_untouched_base_has_the_held_out_loss_of_the_run(
    make, tmp_path, tiny_model_dir, method
):
    """Of all that training keeps in memory, changed base weights above all, nothing is needed."""
    from hiplora.data.encoding import encode_example
    from hiplora.data.examples import DataSettings, load_data
    from tests.tiny import tiny_tokenizer

    recipe = make(method)
    result = train(recipe, tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    data = load_data(DataSettings(path=recipe.data.path, held_out_fraction=0.2))
    total = count = 0.0
    for example in data.held_out:
        ids, labels = (torch.tensor([part]) for part in encode_example(tiny_tokenizer(), example))
        learned = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += model(ids, labels=labels).loss.item() * learned
        count += learned
    assert total / count == pytest.approx(result.held_out["after"], rel=1e-5)
    assert result.held_out["after"] != pytest.approx(result.held_out["before"], rel=1e-2)


@pytest.mark.parametrize("method", MOVED)
def test_an_adapter_that_moved_the_base_is_a_plain_lora_of_twice_the_rank(make, tmp_path, method):
    train(make(method, steps=1), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (32, 64, True)
    assert config["corda_config"] is None
    shapes = {tensor.shape[0] for name, tensor in tensors(tmp_path / "out").items() if "lora_A" in name}
    assert shapes == {32}


UNPACKED = {"packing": False, "dtype": "bf16"}


@pytest.mark.parametrize(
    ("method", "settings"),
    [*((m, {}) for m in METHODS), ("hiplora", UNPACKED), *((m, UNPACKED) for m in MOVED)],
)
def test_a_resumed_run_equals_the_uninterrupted_one(make, tmp_path, method, settings):
    """Stopped after step 5, behind the checkpoint of step 3 and between two logged rows."""
    recipe = make(method, **settings, eval_every=4)
    whole = train(recipe, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(recipe, tmp_path / "parts", on_step=stop_at(4))
    notes = []
    parts = train(recipe, tmp_path / "parts", on_note=notes.append)
    assert notes == ["carrying on from step 3 of 8"]
    assert numbers(parts.metrics) == numbers(whole.metrics)
    assert numbers(read_metrics(tmp_path / "parts")) == numbers(whole.metrics)
    first, second = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("cut_layer", [0, 1, 2])
def test_split_lora_with_one_client_is_plain_lora_wherever_the_cut_is(make, tmp_path, cut_layer):
    plain = train(make("lora"), tmp_path / "plain")
    split = {"name": "split_lora", "clients": 1, "cut_layer": cut_layer, "average_every": 3}
    made = train(make(split), tmp_path / "split")
    assert numbers(made.metrics) == numbers(plain.metrics)
    assert made.trainable_parameters == plain.trainable_parameters
    first, second = tensors(tmp_path / "plain"), tensors(tmp_path / "split")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_adapter_of_split_lora_is_a_plain_lora(make, tmp_path):
    for method in ("lora", "split_lora"):
        train(make(method, steps=2), tmp_path / method)
    plain, split = (
        json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("lora", "split_lora")
    )
    assert {**split, "target_modules": sorted(split["target_modules"])} == {
        **plain,
        "target_modules": sorted(plain["target_modules"]),
    }
    first, second = tensors(tmp_path / "lora"), tensors(tmp_path / "split_lora")
    assert {name: value.shape for name, value in first.items()} == {
        name: value.shape for name, value in second.items()
    }


def test_a_checkpoint_of_split_lora_has_the_average_and_every_clients_side(make, tmp_path):
    """Saved after step 3; averaged after step 2 and then after step 4."""
    with pytest.raises(Stopped):
        train(make("split_lora"), tmp_path / "out", on_step=stop_at(4))
    folder = tmp_path / "out" / "checkpoints" / "step-3"
    sides, adapter = load_file(folder / "clients.safetensors"), tensors(folder)
    assert sides
    assert len(sides) == 2 * sum("layers.0." in name for name in adapter)
    for name, own in sides.items():
        client, _, path = name.partition(".")
        other = sides[f"{1 - int(client)}.{path}"]
        assert not torch.equal(own, other)
        saved = adapter[path.replace(".default", "")]
        torch.testing.assert_close(saved, (own + other) / 2)


def test_more_clients_than_rows_is_an_error_that_says_so(make, tmp_path):
    recipe = make({"name": "split_lora", "clients": 30}, gradient_accumulation=30, packing=False)
    with pytest.raises(ConfigError, match=r"method\.clients 30: there are only 24 training sequences"):
        train(recipe, tmp_path / "out")


@pytest.mark.parametrize("method", ["lora", "split_lora"])
def test_a_run_resumed_in_a_later_epoch_equals_the_uninterrupted_one(make, tmp_path, method):
    recipe = make(method, epochs=3, steps=None, data={"limit": 9, "held_out_fraction": 0.34}, log_every=1)
    whole = train(recipe, tmp_path / "whole")
    assert whole.steps >= 3
    with pytest.raises(Stopped):
        train(recipe, tmp_path / "parts", on_step=stop_at(whole.steps))
    parts = train(recipe, tmp_path / "parts")
    assert numbers(parts.metrics) == numbers(whole.metrics)
    assert all(torch.equal(tensors(tmp_path / "whole")[k], v) for k, v in tensors(tmp_path / "parts").items())


def test_a_run_stopped_after_its_last_step_is_only_assembled(make, tmp_path, monkeypatch):
    from hiplora.training import sft

    recipe = make("pissa")
    with monkeypatch.context() as broken:
        broken.setattr(sft, "model_card", lambda *_: (_ for _ in ()).throw(Stopped()))
        with pytest.raises(Stopped):
            train(recipe, tmp_path / "parts")
    assert not (tmp_path / "parts" / "adapter_config.json").exists()
    before = numbers(read_metrics(tmp_path / "parts"))
    result = train(recipe, tmp_path / "parts")
    assert numbers(result.metrics) == before
    whole = train(recipe, tmp_path / "whole")
    assert numbers(result.metrics) == numbers(whole.metrics)
    assert all(torch.equal(tensors(tmp_path / "whole")[k], v) for k, v in tensors(tmp_path / "parts").items())


@pytest.mark.parametrize("method", MOVED)
def test_a_resumed_run_has_its_start_from_the_folder_and_computes_none(make, tmp_path, monkeypatch, method):
    recipe = make(method)
    whole = train(recipe, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(recipe, tmp_path / "parts", on_step=stop_at(4))
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **kwargs: pytest.fail("decomposed again"))
    monkeypatch.setattr(moved_starts, "survey", lambda *args: pytest.fail("prepared again"))
    parts = train(recipe, tmp_path / "parts")
    assert numbers(parts.metrics) == numbers(whole.metrics)
    assert all(torch.equal(tensors(tmp_path / "whole")[k], v) for k, v in tensors(tmp_path / "parts").items())


@pytest.mark.parametrize("method", MOVED)
def test_a_start_with_more_directions_than_a_weight_has_is_refused(make, tmp_path, method):
    with pytest.raises(ConfigError, match=r"k_proj: r 33 exceeds min\(out, in\) = 32"):
        train(make({**METHODS[method], "r": 33}), tmp_path / "out")


def test_calibration_text_that_cannot_be_read_is_named(make, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text(" ")
    for method in ("corda", "lora_null"):
        with pytest.raises(DataError, match=r"empty\.txt: is empty"):
            train(make({"name": method, "calibration_text": str(empty)}), tmp_path / method)


def test_a_finished_run_is_returned_as_it_is_on_resume_and_refused_otherwise(make, tmp_path):
    recipe = make(steps=2)
    result = train(recipe, tmp_path / "out")
    stamp = (tmp_path / "out" / "adapter_model.safetensors").stat().st_mtime_ns
    notes = []
    assert train(recipe, tmp_path / "out", resume=True, on_note=notes.append) == result
    assert "nothing to do" in notes[0]
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(ConfigError, match="exists already"):
        train(recipe, tmp_path / "out")
    again = train(make(steps=3), tmp_path / "out", overwrite=True)
    assert again.steps == 3


def test_seeds_repeat_a_run_and_tell_runs_apart(make, tmp_path):
    recipe = make("hiplora", steps=3)
    first, second = train(recipe, tmp_path / "a"), train(recipe, tmp_path / "b")
    other = train(recipe.model_copy(update={"seed": 7}), tmp_path / "c")
    assert numbers(first.metrics) == numbers(second.metrics)
    assert numbers(first.metrics)[1:] != numbers(other.metrics)[1:]
    assert first.held_out["before"] == other.held_out["before"]


@pytest.mark.parametrize("method", ["lora", "hiplora"])
def test_accumulating_gradients_equals_the_large_batch(make, tmp_path, method):
    settings = {"steps": 4, "packing": False, "log_every": 1}
    quiet = {**METHODS[method], "lora_dropout": 0.0}
    large = train(make(quiet, **settings, batch_size=4, gradient_accumulation=1), tmp_path / "large")
    small = train(make(quiet, **settings, batch_size=1, gradient_accumulation=4), tmp_path / "small")
    for one, other in zip(numbers(large.metrics), numbers(small.metrics), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_gradient_checkpointing_computes_again_and_changes_no_number(make, tmp_path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls, forward = [], LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda *args: calls.append(1) or forward(*args))
    plain = train(make("hiplora", steps=3), tmp_path / "plain")
    once = len(calls)
    saved = train(make("hiplora", steps=3, gradient_checkpointing=True), tmp_path / "saved")
    assert len(calls) - once > once
    for one, other in zip(numbers(plain.metrics), numbers(saved.metrics), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_the_learning_rate_warms_up_and_then_stays(make, tmp_path):
    result = train(make(steps=10, warmup_ratio=0.35, log_every=1, lr=0.01), tmp_path / "out")
    rates = [row["lr"] for row in result.metrics if "lr" in row]
    assert rates == pytest.approx([0, 0.0025, 0.005, 0.0075] + [0.01] * 6)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_adapter_is_fp32_whatever_the_base_is_computed_in(make, tmp_path, dtype):
    result = train(make("hiplora", steps=2, dtype=dtype), tmp_path / "out")
    assert {t.dtype for n, t in tensors(tmp_path / "out").items() if "hiplora_A" in n} == {torch.float32}
    assert result.held_out["before"] == pytest.approx(5.6, abs=0.2)


def test_fp16_without_a_gpu_is_refused_before_the_model_is_loaded(make, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("hiplora.training.sft.load", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        train(make(dtype="fp16"), tmp_path / "out")


def test_bad_data_are_found_before_the_model_is_loaded_and_leave_no_folder(make, tmp_path, monkeypatch):
    monkeypatch.setattr("hiplora.training.sft.load", lambda *_: pytest.fail("the model was loaded"))
    path = write_jsonl(tmp_path / "bad.jsonl", [{"instruction": "a", "output": "b"}, {"instruction": "a"}])
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2: field `output` is missing"):
        train(make(data={"path": path}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_method_that_does_not_fit_the_model_names_the_setting(make, tmp_path):
    with pytest.raises(ConfigError, match=r"method\.target_modules"):
        train(make({"name": "lora", "target_modules": ["no_such_proj"]}), tmp_path / "out")


def test_a_diverging_run_stops_with_advice_and_completes_nothing(make, tmp_path):
    with pytest.raises(HipLoraError, match=r"the loss is .* at step .*Lower train\.lr"):
        train(make(lr=1e30, warmup_ratio=0.0, max_grad_norm=0.0), tmp_path / "out")
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_rows_that_are_cut_or_left_out_are_told_and_written_down(make, tmp_path):
    notes = []
    long = write_jsonl(
        tmp_path / "long.jsonl",
        [{"prompt": "p" * 9, "completion": "c" * size} for size in (5, 5, 90)]
        + [{"prompt": "p" * 90, "completion": "c"}],
    )
    data = {"path": long, "held_out_fraction": None}
    result = train(make(data=data, max_length=32, steps=1), tmp_path / "out", on_note=notes.append)
    assert result.warnings == notes
    assert "1 of 4 responses are cut" in notes[0]
    assert "1 of 4 rows are left out" in notes[1]
    assert result.held_out is None
    assert all(note in (tmp_path / "out" / "README.md").read_text() for note in notes)


def test_nothing_is_written_to_the_base_model_or_outside_the_folder(make, tmp_path, tiny_model_dir):
    before = {path.name: file_sha256(path) for path in tiny_model_dir.iterdir()}
    (tmp_path / "work").mkdir()
    train(make("pissa", steps=2), tmp_path / "work" / "out")
    assert {path.name: file_sha256(path) for path in tiny_model_dir.iterdir()} == before
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["out"]
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert torch.equal(logits(base), logits(tiny_llama()))


def test_a_conversation_and_plain_text_train_too(make, tmp_path):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    for name, row in (("messages", {"messages": talk}), ("text", {"text": "a long text " * 40})):
        path = write_jsonl(tmp_path / f"{name}.jsonl", [row] * 4)
        data = {"path": path, "held_out_fraction": None}
        result = train(make(data=data, steps=2), tmp_path / name)
        assert result.data["shape"] == name
        assert result.metrics[-1]["tokens"] == result.tokens > 0


def test_nothing_goes_over_the_network(make, tmp_path, monkeypatch):
    """Neither a look-up of the base model's name, nor the usage report that TRL sends by default."""
    import socket

    import huggingface_hub.constants
    import trl.trainer.base_trainer

    called = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(trl.trainer.base_trainer, "send_telemetry", lambda **kwargs: called.append(kwargs))
    for target, name in ((socket, "getaddrinfo"), (socket.socket, "connect")):
        monkeypatch.setattr(target, name, lambda *args, **kwargs: called.append(args))
    train(make(steps=1), tmp_path / "out")
    assert called == []


def test_a_basis_from_the_training_rows_is_warned_of(make, rows, tmp_path):
    method = {"name": "hiplora", "principal_rank": 8, "calibration_tokens": 600}
    (own,) = train(make({**method, "calibration_text": str(rows)}, steps=1), tmp_path / "own").warnings
    assert "method.calibration_text is the training data" in own
    other = tmp_path / "other.txt"
    other.write_text("Another text, of a ferry and its captain. " * 60)
    assert train(make({**method, "calibration_text": str(other)}, steps=1), tmp_path / "other").warnings == []
