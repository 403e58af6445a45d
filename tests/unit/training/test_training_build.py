"""Every setting of a recipe reaches the trainer; what a run measures of memory is its own."""

import subprocess
import sys

import pytest

from hiplora.training import build
from hiplora.training.memory import CLEAR
from hiplora.training.metrics import Record
from hiplora.training.recipe import TrainRecipe, TrainSettings
from hiplora.training.run import RunFolder
from tests.tiny import tiny_llama, tiny_tokenizer

# setting → (a value that is no default of any library, what shows that it arrived)
ARRIVES = {
    "lr": (3e-5, lambda made: made.args.learning_rate == 3e-5),
    "steps": (17, lambda made: made.args.max_steps == 17),
    "batch_size": (3, lambda made: made.args.per_device_train_batch_size == 3),
    "gradient_accumulation": (5, lambda made: made.args.gradient_accumulation_steps == 5),
    "max_length": (24, lambda made: max(len(row["input_ids"]) for row in made.train_dataset) == 24),
    "packing": (False, lambda made: len(made.train_dataset) == 6),
    "lr_scheduler": ("cosine", lambda made: made.args.lr_scheduler_type == "cosine"),
    "warmup_ratio": (0.5, lambda made: made.args.warmup_steps == 9),
    "weight_decay": (0.125, lambda made: made.args.weight_decay == 0.125),
    "max_grad_norm": (0.75, lambda made: made.args.max_grad_norm == 0.75),
    "dtype": ("bf16", lambda made: made.args.bf16 and not made.args.fp16),
    "gradient_checkpointing": (True, lambda made: made.args.activation_checkpointing),
    "save_every": (7, lambda made: made.args.save_steps == 7),
    "keep_checkpoints": (4, lambda made: made._keep_checkpoints == 4),
    "kl_weight": (0.5, lambda made: [penalty.weight for penalty in made._penalties] == [0.5]),
    "eval_every": (
        6,
        lambda made: any(getattr(c, "_eval_every", 0) == 6 for c in made.callback_handler.callbacks),
    ),
}
# total_steps and the record take the first two; the others have tests of their own.
ELSEWHERE = {"epochs", "log_every", "start_from", "kl_text", "kl_tokens", "kl_pool"}


def make_trainer(tmp_path, **settings):
    recipe = TrainRecipe.model_validate(
        {
            "model": "tiny",
            "data": {"path": "unused.jsonl", "held_out_fraction": 0.5},
            "method": "lora",
            "train": {"steps": 17, "max_length": 48, **settings},
            "seed": 11,
        }
    )
    ids = list(range(12))
    data = build.sequences([{"input_ids": ids, "labels": ids}] * 6, recipe.train)
    steps = build.total_steps(recipe.train, len(data))
    run = RunFolder(tmp_path)
    return build.build_trainer(
        recipe, run, tiny_llama(), tiny_tokenizer(), data, data, Record(tmp_path, steps, 1), steps
    )


def test_the_walk_below_leaves_no_setting_out():
    assert ARRIVES.keys() | ELSEWHERE == TrainSettings.model_fields.keys()


@pytest.mark.parametrize("name", ARRIVES)
def test_a_setting_reaches_the_trainer_and_is_not_there_without_it(tmp_path, name):
    value, arrived = ARRIVES[name]
    assert arrived(make_trainer(tmp_path, **{name: value}))
    if name != "steps":
        assert not arrived(make_trainer(tmp_path))


def test_the_optimizer_the_schedule_and_the_seed_are_what_the_recipe_says(tmp_path):
    arguments = make_trainer(tmp_path).args
    assert arguments.optim == "adamw_torch"
    assert arguments.lr_scheduler_type == "constant_with_warmup"
    assert arguments.seed == 11
    assert arguments.report_to == []


def test_the_cosine_rises_to_the_rate_and_ends_at_zero(tmp_path):
    made = make_trainer(tmp_path, lr_scheduler="cosine", warmup_ratio=0.2, lr=1.0, steps=20)
    made.create_optimizer_and_scheduler(20)
    rates = []
    for _ in range(20):
        made.optimizer.step()
        made.lr_scheduler.step()
        rates.append(made.lr_scheduler.get_last_lr()[0])
    assert rates[3] == max(rates) == 1.0
    assert rates[11] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0, abs=1e-9)


def test_packed_sequences_hold_several_rows_and_lose_none(tmp_path):
    made = make_trainer(tmp_path)
    assert sorted(len(row["input_ids"]) for row in made.train_dataset) == [24, 48]
    assert [row["seq_lengths"] for row in made.train_dataset] == [[12] * 4, [12] * 2]


@pytest.mark.skipif(
    not CLEAR.exists(), reason="no high-water mark of memory that can be reset on this system"
)
def test_the_peak_is_that_since_the_last_reset():
    """In a process of its own: other tests leave memory behind that their peak would hide."""
    script = """
from hiplora.training.memory import peak_bytes, reset_peak
reset_peak()
start = peak_bytes()
block = bytearray(300 * 2**20)
with_block = peak_bytes()
del block
reset_peak()
after = peak_bytes()
print(start > 2**20, with_block - start > 250 * 2**20, with_block - after > 250 * 2**20)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "True True True\n"
