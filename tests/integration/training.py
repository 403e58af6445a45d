"""Small trainings: their recipes, a stop in the middle of a step, and when two runs are the same."""

import json

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hiplora.training.recipe import TrainRecipe
from hiplora.training.result import read_metrics
from tests.tiny import write_jsonl

SETTINGS = {
    "steps": 8, "batch_size": 2, "gradient_accumulation": 2, "max_length": 160, "lr": 1e-2, "weight_decay": 0.0,
    "dtype": "fp32", "save_every": 3, "log_every": 2,
}  # fmt: skip


def small_rows(path, count=12, task="Say"):
    return write_jsonl(
        path, [{"prompt": f"{task} {n}: ", "completion": f"{n} it is" * (1 + n % 3)} for n in range(count)]
    )


def small_recipe(model, rows, method, data=None, seed=42, **settings):
    blocks = {"data": {"path": rows, "held_out_fraction": 0.2, **(data or {})}, "train": {**SETTINGS, **settings}}
    return TrainRecipe.model_validate({"model": str(model), "method": method, "seed": seed, **blocks})


def recipe_file(folder, model, method, rows=12, **settings):
    data = {"path": str(small_rows(folder / "rows.jsonl", rows)), "held_out_fraction": 0.2}
    settings = {"steps": 6, "batch_size": 2, "max_length": 64, "lr": 1e-2, **settings}
    (folder / "recipe.yaml").write_text(
        json.dumps({"model": str(model), "data": data, "method": method, "train": settings})
    )
    return folder / "recipe.yaml"


class Stopped(Exception):
    pass


class StopAt(TrainerCallback):
    """Stop in the middle of a step."""

    def __init__(self, step):
        self.step = step

    def on_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            raise Stopped


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def numbers(rows):
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]


def assert_equal_runs(one, other):
    assert numbers(one.metrics) == numbers(other.metrics)
    assert numbers(read_metrics(one.adapter)) == numbers(read_metrics(other.adapter))
    first, second = tensors(one.adapter), tensors(other.adapter)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
