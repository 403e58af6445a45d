"""`train`: every method from a recipe to an adapter that loads; a resumed run equals the whole one to the bit."""

import json
import os
import shutil
import signal
from unittest.mock import Mock

import peft
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, TrainerCallback

from hiplora.adapters import save_as_lora
from hiplora.data.encoding import encode_examples
from hiplora.data.examples import Example, load_data
from hiplora.errors import ConfigError, DataError, DivergedError, HipLoraError
from hiplora.provenance import file_sha256
from hiplora.training import TrainResult, train
from hiplora.training.result import model_card, read_metrics
from hiplora.training.sequences import keeps_rows_apart, preview
from tests.integration.training import StopAt, Stopped, assert_equal_runs, numbers, small_recipe, tensors
from tests.models.zoo import CASE
from tests.tiny import save_with_tokenizer, tiny_mixture, tiny_tokenizer, write_jsonl

METHODS = {
    "hiplora": {"name": "hiplora", "principal_rank": 8, "calibration_tokens": 1024},
    "paper": {"name": "hiplora", "preset": "paper", "principal_rank": 8},
    "lora": {"name": "lora"},
    "pissa": {"name": "pissa"},
    "milora": {"name": "milora"},
    "corda": {"name": "corda", "calibration_tokens": 1024},
    "lora_null": {"name": "lora_null", "calibration_tokens": 1024},
    "adalora": {"name": "adalora", "r": 4, "init_r": 6, "tinit": 1, "tfinal": 2, "deltaT": 1},
    "osf": {"name": "osf", "effective_rank": 0.25},
    "split_lora": {"name": "split_lora", "clients": 2, "cut_layer": 1, "average_every": 2},
}


FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "checkpoints", "metrics.jsonl"}
FILES |= {"provenance.json", "recipe.yaml"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    return write_jsonl(path, [{"instruction": f"Say {n}", "output": f"{n} it is" * (1 + n % 3)} for n in range(30)])


@pytest.fixture(scope="module")
def make(tiny_model_dir, rows):
    def recipe(method="lora", data=None, **settings):
        method = METHODS[method] if isinstance(method, str) else method
        return small_recipe(tiny_model_dir, rows, method, data, **settings)

    return recipe


@pytest.fixture(scope="module")
def whole(make, tmp_path_factory):
    """Uninterrupted runs, each trained once."""
    done = {}

    def run(method):
        if method not in done:
            done[method] = train(make(method), tmp_path_factory.mktemp(method) / "out")
        return done[method]

    return run


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_and_its_folder_is_complete(whole, make, rows, method):
    result = whole(method)
    assert {path.name for path in result.adapter.iterdir()} == FILES
    assert read_metrics(result.adapter) == result.metrics
    assert [row["step"] for row in result.metrics] == [0, 2, 4, 6, 8]
    assert result.held_out["after"] < result.held_out["before"]
    stored = json.loads((result.adapter / "provenance.json").read_text())
    assert stored["data"]["train"]["sha256"] == file_sha256(rows)
    assert (stored["seed"], stored["recipe"]["method"]["name"]) == (42, METHODS[method]["name"])
    assert {"commit", "libraries", "machine", "recipe_sha256"} <= stored.keys()
    assert TrainResult.read(result.adapter) == result
    assert [path.name for path in result.adapter.glob("checkpoints/checkpoint-*")] == ["checkpoint-8"]


@pytest.mark.parametrize("method", METHODS)
def test_the_adapter_on_the_untouched_base_has_the_held_out_loss_of_the_run(whole, make, tiny_model_dir, method):
    result = whole(method)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model = peft.PeftModel.from_pretrained(base, result.adapter).eval()
    losses = []
    for row in encode_examples(tiny_tokenizer(), load_data(make(method).data).held_out, 1000)[0]:
        ids, labels = (torch.tensor(row[part]) for part in ("input_ids", "labels"))
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="none")
        losses += each[labels[1:] != -100].tolist()
    assert sum(losses) / len(losses) == pytest.approx(result.held_out["after"], rel=1e-5)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("milora", "corda", "lora_null")])
def test_a_resumed_run_equals_the_uninterrupted_one(whole, make, tmp_path, caplog, method):
    """Stopped in step 5, between two logged rows; PiSSA stands for all that move the base."""
    with pytest.raises(Stopped):
        train(make(method), tmp_path / "parts", callbacks=[StopAt(5)])
    assert not (tmp_path / "parts" / "adapter_config.json").exists()
    parts = train(make(method), tmp_path / "parts")
    assert "carrying on from step 3 of 8" in caplog.text
    assert_equal_runs(parts, whole(method))


# Known defect: AdaLoRA resumed in bf16 after its ranks were pruned differs from the fourth digit of the loss on.
_ADALORA = pytest.param("adalora", marks=pytest.mark.xfail(strict=True, reason="not exact in bf16 after pruning"))


@pytest.mark.slow
@pytest.mark.parametrize("method", [*(name for name in METHODS if name != "adalora"), _ADALORA])
def test_a_run_resumed_in_a_later_epoch_in_bf16_with_a_penalty_equals_the_uninterrupted_one(make, tmp_path, method):
    settings = {"epochs": 3, "steps": None, "log_every": 1, "packing": False, "dtype": "bf16", "eval_every": 2}
    if method not in ("pissa", "milora", "corda", "lora_null"):
        settings |= {"kl_weight": 0.5, "kl_tokens": 32, "kl_pool": 128}
    recipe = make(method, data={"limit": 12}, **settings)
    uninterrupted = train(recipe, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(recipe, tmp_path / "parts", callbacks=[StopAt(uninterrupted.steps)])
    assert_equal_runs(train(recipe, tmp_path / "parts"), uninterrupted)


def test_a_finished_run_is_returned_on_resume_and_refused_otherwise(make, tmp_path, caplog):
    recipe = make(steps=2)
    result = train(recipe, tmp_path / "out")
    assert train(recipe, tmp_path / "out", resume=True) == result
    assert "nothing to do" in caplog.text
    with pytest.raises(ConfigError, match="exists already"):
        train(recipe, tmp_path / "out")
    assert train(make(steps=3), tmp_path / "out", overwrite=True).steps == 3


def test_a_folder_of_another_recipe_or_other_data_is_refused(make, tmp_path, rows):
    data = {"path": write_jsonl(tmp_path / "rows.jsonl", [json.loads(line) for line in rows.read_text().splitlines()])}
    with pytest.raises(Stopped):
        train(make(data=data), tmp_path / "out", callbacks=[StopAt(5)])
    with pytest.raises(ConfigError, match=r"unfinished run with other settings \(train\.lr: 0\.01 there, 0\.02 here"):
        train(make(data=data, lr=0.02), tmp_path / "out")
    write_jsonl(tmp_path / "rows.jsonl", [{"instruction": f"x{n}", "output": "y"} for n in range(9)])
    with pytest.raises(ConfigError, match="the data changed since this run began"):
        train(make(data=data), tmp_path / "out")


def test_split_lora_with_one_client_is_plain_lora(whole, make, tmp_path):
    split = {"name": "split_lora", "clients": 1, "cut_layer": 1, "average_every": 3}
    assert_equal_runs(train(make(split), tmp_path / "split"), whole("lora"))


def test_split_lora_that_ends_between_two_averagings_gives_the_average_of_the_clients(make, tmp_path):
    split = METHODS["split_lora"] | {"average_every": 100}
    result = train(make(split, steps=24, lr=0.03, eval_every=1, patience=2, warmup_ratio=0.0), tmp_path / "out")
    assert result.steps < 24
    measured = tensors(result.adapter / "checkpoints" / f"checkpoint-{result.steps}")
    assert all(value.equal(measured[name]) for name, value in tensors(result.adapter).items())


@pytest.mark.parametrize("method", ["lora", "paper"])
def test_accumulating_gradients_equals_the_large_batch(make, tmp_path, method):
    settings = {"steps": 4, "packing": False, "log_every": 1}
    quiet = {**METHODS[method], "lora_dropout": 0.0}
    large = train(make(quiet, **settings, batch_size=4, gradient_accumulation=1), tmp_path / "large")
    small = train(make(quiet, **settings, batch_size=1, gradient_accumulation=4), tmp_path / "small")
    for one, other in zip(numbers(large.metrics), numbers(small.metrics), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_a_packed_sequence_keeps_its_rows_apart(make, tmp_path):
    """The held-out loss of packed rows is that of the rows alone."""
    packed, alone = (train(make(packing=on, steps=1), tmp_path / str(on)).held_out["before"] for on in (True, False))
    assert packed == pytest.approx(alone, rel=1e-5)


def test_a_penalty_is_logged_counts_once_a_step_and_holds_the_model_back(make, tmp_path):
    settings = {"packing": False, "max_grad_norm": 0.0, "log_every": 1, "steps": 24, "save_every": 24}
    settings |= {"kl_tokens": 32, "kl_pool": 128}
    quiet = {"name": "lora", "lora_dropout": 0.0}
    runs = []
    for number, (weight, size) in enumerate([(100.0, 4), (100.0, 1), (1e-9, 4)]):
        recipe = make(quiet, **settings, kl_weight=weight, batch_size=size, gradient_accumulation=4 // size)
        runs.append([row["kl"] for row in train(recipe, tmp_path / str(number)).metrics if "kl" in row])
    one, four, cheap = runs
    assert one[0] == 0
    assert one[2:] == pytest.approx(four[2:], rel=1e-3)
    assert one[-1] < 0.75 * cheap[-1]


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"steps": 10, "warmup_ratio": 0.35}, [0, 0.0025, 0.005, 0.0075, *[0.01] * 6]),
        ({"steps": 4, "warmup_ratio": 0.5, "nonzero_warmup": True}, [0.005, 0.01, 0.01, 0.01]),
    ],
)
def test_the_learning_rate_warms_up_and_then_stays_or_falls(make, tmp_path, settings, rates):
    settings |= {"log_every": 1, "lr": 0.01}
    metrics = train(make(**settings), tmp_path / "a").metrics
    assert [row["lr"] for row in metrics if "lr" in row] == pytest.approx(rates)
    falling = train(make(**settings, lr_scheduler="cosine"), tmp_path / "b").metrics
    assert 0 < falling[-1]["lr"] < 0.8 * rates[-1]


@pytest.mark.parametrize("settings", [{"token_weight": "eaft"}, {"masked_kl_weight": 5.0}, {"replay": 0.25}])
def test_losses_against_forgetting_train_on_top_of_hiplora(whole, make, tmp_path, settings):
    result, plain = train(make("paper", **settings), tmp_path / "out"), whole("paper")
    assert result.held_out["after"] < result.held_out["before"] == plain.held_out["before"]
    assert plain.final_loss != result.final_loss


def test_rows_of_which_nothing_is_learned_take_no_step(make, tmp_path, monkeypatch):
    def mask_most(model, rows):
        for row in rows[2:]:
            row["labels"] = [-100] * len(row["labels"])
        return 1

    monkeypatch.setattr("hiplora.training.losses.mask_unlikely", mask_most)
    settings = {"token_weight": "stm", "masked_kl_weight": 1.0, "batch_size": 1, "gradient_accumulation": 1}
    result = train(make(**settings, packing=False, steps=None, epochs=1), tmp_path / "out")
    assert result.steps == 2
    assert result.final_loss > 0


@pytest.mark.parametrize("replay", [0.0, 0.5])
def test_a_preview_counts_the_steps_that_are_trained(make, tmp_path, replay):
    recipe = make(replay=replay, packing=False, steps=None, epochs=1)
    assert preview(recipe, 0)[0]["steps"] == train(recipe, tmp_path / "out").steps


def test_drift_is_measured_at_the_end_and_ends_a_training_with_the_last_checkpoint_below(make, tmp_path):
    settings = {"drift_tokens": 64, "eval_every": 2, "steps": 12, "keep_checkpoints": 6, "packing": False}
    free = train(make(**settings), tmp_path / "free")
    assert list(free.drift) == ["prose", "python code"]
    assert free.drift["prose"]["kl"] > 0
    limit = max(one["kl"] for one in free.drift.values()) / 3
    held = train(make(**settings, max_drift=limit, patience=3), tmp_path / "held")  # the loss still falls
    assert max(one["kl"] for one in held.drift.values()) <= limit
    assert 0 < held.steps < 12
    assert "stopped by train.max_drift" in held.warnings[-1]
    once = train(make(**settings | {"eval_every": None}, max_drift=limit), tmp_path / "once")
    assert once.held_out["after"] != once.held_out["before"]  # measured anew, at the step that is kept
    assert TrainResult.read(held.adapter) == held
    with pytest.raises(HipLoraError, match="when it is first measured"):
        train(make(**settings, max_drift=1e-9), tmp_path / "none")


def test_with_patience_a_training_ends_with_the_adapter_of_the_lowest_held_out_loss_also_when_resumed(make, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", [{"instruction": f"Say {n}", "output": "never"} for n in range(8)])
    settings = {"steps": 24, "lr": 0.01, "eval_every": 1, "patience": 3, "warmup_ratio": 0.0, "log_every": 100}
    settings |= {"lr_scheduler": "constant", "data": {"held_out": str(other), "held_out_fraction": None}}
    result = train(make(**settings), tmp_path / "out")
    *held_out, last = result.metrics  # of the steps that no row was due for
    assert (last["step"], last["loss"]) == (held_out[-1]["step"], result.final_loss)
    losses = {row["step"]: row["held_out_loss"] for row in held_out if row["step"]}
    assert result.steps + 3 == max(losses) < 24
    assert result.held_out["after"] == losses[result.steps] == min(losses.values())
    assert f"did not fall further; the adapter is that of step {result.steps}" in result.warnings[-1]
    short = train(make(**settings | {"steps": result.steps, "patience": None}), tmp_path / "short")
    assert all(value.equal(tensors(result.adapter)[name]) for name, value in tensors(short.adapter).items())
    with pytest.raises(Stopped):
        train(make(**settings), tmp_path / "resumed", callbacks=[StopAt(max(losses))])
    assert_equal_runs(train(make(**settings), tmp_path / "resumed"), result)


@pytest.mark.parametrize("settings", [{}, {"max_drift": 0.5, "drift_tokens": 64}], ids=["patience", "max_drift too"])
def test_a_run_that_is_killed_after_patience_ended_it_ends_there_again(make, tmp_path, monkeypatch, settings):
    settings = {"eval_every": 1, "patience": 1, "lr": 0.1, "save_every": 1, "packing": False, **settings}
    whole = train(make(**settings), tmp_path / "whole")
    assert "train.patience" in whole.warnings[-1]
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("hiplora.training.trainer.Record.return_to_best", Mock(side_effect=Stopped))
        train(make(**settings), tmp_path / "parts")
    assert_equal_runs(train(make(**settings), tmp_path / "parts"), whole)


def test_rows_are_tokenized_before_the_model_is_loaded_and_long_held_out_rows_are_said(make, tmp_path, monkeypatch):
    monkeypatch.setattr("hiplora.models.load", None)
    long = write_jsonl(tmp_path / "long.jsonl", [{"instruction": "Say", "output": "never" * 99}])
    recipe = make(data={"held_out": str(long), "held_out_fraction": None})
    assert preview(recipe, 1)[0]["notes"][0].startswith("held out: 1 of 1 responses are cut at 160 tokens")
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
    path = write_jsonl(tmp_path / "calls.jsonl", [{"messages": [{"role": "user", "content": "Hi"}, called]}] * 2)
    with pytest.raises(DataError, match=r"calls\.jsonl, line 1: .*leaves out the tool calls"):
        train(make(data={"path": str(path), "held_out_fraction": None}), tmp_path / "out")


def test_a_mixture_of_experts_trains_and_its_held_out_loss_has_no_share_of_the_routers(rows, tmp_path, caplog):
    model = tiny_mixture(output_router_logits=True, router_aux_loss_coef=5.0, eos_token_id=257)
    save_with_tokenizer(model, tmp_path / "model")
    caplog.set_level("INFO", logger="hiplora.training")  # which has the time of a step measured
    result = train(small_recipe(tmp_path / "model", rows, {"name": "lora"}, steps=2), tmp_path / "out")
    assert "steps" in caplog.text
    assert 4 < result.held_out["before"] < 6.5  # log(259) is 5.6


@pytest.mark.parametrize("name", ["OPT", "BLOOM", "Falcon", "LFM2", "Llama"])
def test_rows_share_a_sequence_only_where_they_do_not_see_each_other(name, rows, tmp_path):
    model = CASE[name].make()
    for part, weight in model.named_parameters():  # its convolutions add little, and refuse what TRL says of the rows
        weight.data *= 1e-4 if part.endswith("conv.conv.weight") else 1
    assert keeps_rows_apart(model) == (name == "Llama")
    save_with_tokenizer(model, tmp_path / "model")
    if name != "Llama":
        with pytest.raises(ConfigError, match=r"train\.packing: rows that share a sequence see each other"):
            train(small_recipe(tmp_path / "model", rows, {"name": "lora"}, packing=True), tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def stopped(make, tmp_path_factory):
    """A run that stopped after its first checkpoint."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.raises(Stopped):
        train(make(), out, callbacks=[StopAt(4)])
    return out


CHECKPOINT = "checkpoints/checkpoint-3"


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "adapter_model.safetensors", "progress.json"])
@pytest.mark.parametrize("damage", ["gone", "flipped"])
def test_a_damaged_checkpoint_is_named_and_not_carried_on_from(stopped, make, tmp_path, name, damage):
    file = shutil.copytree(stopped, tmp_path / "out") / CHECKPOINT / name
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.unlink()
    if damage == "flipped":
        file.write_bytes(raw)
    with pytest.raises(HipLoraError, match=f"checkpoint-3: {name} is missing or damaged; remove it"):
        train(make(), tmp_path / "out")


@pytest.mark.parametrize("content", ["{}", "3", '{"progress.json": 3}', "\xff", "[" * 99_999])
@pytest.mark.parametrize("name", [f"{CHECKPOINT}/hashes.json", "checkpoints/run.json", CHECKPOINT])
def test_what_is_damaged_is_not_taken_for_verified(stopped, make, tmp_path, name, content):
    file = shutil.copytree(stopped, tmp_path / "out") / name
    shutil.rmtree(file, ignore_errors=True)
    file.write_text(content, encoding="latin-1")
    with pytest.raises(HipLoraError, match=r"is missing or damaged|is damaged|put them back"):
        train(make(), tmp_path / "out")


@pytest.mark.parametrize("content", [None, "[", "null", '{"result": 3}', "\xff"])
@pytest.mark.parametrize("name", ["provenance.json", "metrics.jsonl"])
def test_a_finished_run_that_is_damaged_says_which_file(whole, make, tmp_path, name, content):
    file = shutil.copytree(whole("lora").adapter, tmp_path / "out") / name
    file.unlink()
    if content is not None:
        file.write_text(content, encoding="latin-1")
    with pytest.raises(HipLoraError, match=rf"{name}: is missing or damaged .*; put it back, or pass --overwrite"):
        train(make("lora"), tmp_path / "out", resume=True)


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("lora", {"report_to": "nope"}, "train.report_to: 'nope' is no tracker; expected none, all or .*wandb"),
        ("lora", {"report_to": ["tensorboard", "none"]}, "train.report_to: "),
        ("lora", {"report_to": "clearml"}, "train.report_to: clearml is not installed"),
        ({"name": "osf", "effective_rank": 64}, {}, "leaves none to train"),
        ({"name": "adalora", "r": 64}, {}, "r 96 exceeds min"),
    ],
)
def test_what_does_not_fit_is_found_before_weights_are_read(make, tmp_path, monkeypatch, method, settings, said):
    monkeypatch.delattr("transformers.PreTrainedModel.from_pretrained")
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match=said):
        train(make(method, **settings), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").exists()


def test_ctrl_c_ends_the_step_with_a_checkpoint_that_is_carried_on_from(whole, make, tmp_path, caplog):
    class Interrupt(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 4:
                os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 5 of 8"):
        train(make("lora"), tmp_path / "out", callbacks=[Interrupt()])
    assert signal.getsignal(signal.SIGINT) is handler
    resumed = train(make("lora"), tmp_path / "out")
    assert "carrying on from step 5 of 8" in caplog.text
    assert_equal_runs(resumed, whole("lora"))


def test_a_finished_run_is_uploaded_as_a_plain_lora_and_survives_a_hub_that_is_not_there(make, tmp_path, hub, caplog):
    train(make("paper", steps=2, push_to_hub="me/mine"), tmp_path / "out")
    assert json.loads((hub / "me/mine/adapter_config.json").read_text())["peft_type"] == "LORA"
    train(make(steps=2, push_to_hub="me/mine"), tmp_path / "again")  # the copy is refused: it exists
    assert "hf upload me/mine" in caplog.text
    assert (tmp_path / "again" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"dtype": "fp16"}, ConfigError, "fp16 needs a GPU"),
        ({"method": {"name": "split_lora", "clients": 30}, "gradient_accumulation": 30}, ConfigError, "there are only"),
        ({"method": {"name": "corda", "calibration_text": "/dev/null"}}, DataError, "is empty"),
        ({"method": {"name": "adalora", "tinit": 5}, "epochs": 1, "steps": None}, ConfigError, "leave none of"),
        ({"method": {"name": "lora", "target_modules": ["no"]}}, ConfigError, r"check method\.target_modules"),
        ({"token_weight": "stm"}, DataError, "stm leaves no token"),  # a random model finds every token unlikely
        ({"lr": 1e30, "warmup_ratio": 0.0, "max_grad_norm": 0.0}, DivergedError, r"the loss is (nan|inf) at step \d"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_and_leaves_no_folder(make, tmp_path, changes, error, said):
    with pytest.raises(error, match=said):
        train(make(**changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


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


def test_a_basis_from_the_training_rows_is_warned_of(make, rows, tmp_path, caplog):
    method = {**METHODS["hiplora"], "calibration_text": str(rows)}
    (said,) = train(make(method, steps=1), tmp_path / "own").warnings
    assert "method.calibration_text is the training data" in said
    assert said in caplog.text


def test_the_card_says_what_the_adapter_is_and_how_to_ask_it_and_names_no_path(whole, tmp_path, tiny_model_dir):
    save_as_lora(whole("paper").adapter, tmp_path / "out", check_logits=False)
    exported = (tmp_path / "out" / "README.md").read_text()
    assert "## Task\\nSay " in exported
    assert "Ask as it was trained" in exported
    for method, said in (("paper", "hiplora export"), ("lora", "a plain LoRA adapter; stock PEFT loads it")):
        card = (whole(method).adapter / "README.md").read_text()
        assert "## Task\\nSay " in card
        assert said in card
        assert f"{whole(method).held_out['after']:.4f}" in card
        assert str(tiny_model_dir.parent) not in card


def test_the_cost_counts_the_rows_that_are_trained_on_and_no_library_advises(make, tmp_path, caplog):
    caplog.set_level("INFO")
    rows = [{"prompt": "a" * size, "completion": " b"} for size in (3, 4, 3000)]
    data = {"path": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "held_out_fraction": None}
    train(make(data=data, steps=1, batch_size=1, eval_every=None), tmp_path / "out")
    assert "1 of 3 rows are left out" in caplog.text
    assert " 2 rows, " in caplog.text
    assert " 1 step, " in caplog.text
    assert "padding-free" not in caplog.text


def test_any_name_of_a_model_is_good_yaml_and_no_folder_of_a_mix_is_in_the_card(make, whole, rows):
    recipe = make("lora", data={"mix": {str(rows): 1.0}})
    recipe = recipe.model_copy(update={"model": '/models/od: d # "x'})
    card = model_card(recipe, whole("lora"), Example("Say ", "1"))
    front = yaml.safe_load(card.split("---")[1])
    assert (front["base_model"], front["tags"]) == ('od: d # "x', ["peft", "lora", "hiplora"])
    assert str(rows.parent) not in card
    assert "rows.jsonl: 1.0" in card
