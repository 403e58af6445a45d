"""AdaLoRA: PEFT's own method, trained as PEFT would."""

import functools

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, set_seed

from hiplora.evaluation.likelihood import heldout_loss
from hiplora.evaluation.updates import task_rows
from hiplora.models import load
from hiplora.training import train
from hiplora.training.trainer import AdapterTrainer
from tests.integration.training import small_recipe, small_rows, tensors

METHOD = {"name": "adalora", "r": 2, "init_r": 6, "tinit": 1, "tfinal": 2, "deltaT": 1}
SETTINGS = {"gradient_accumulation": 1, "max_length": 96, "log_every": 1}


@pytest.fixture(scope="module")
def recipe(tiny_model_dir, tmp_path_factory):
    path = small_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", 24)
    return functools.partial(small_recipe, tiny_model_dir, path, **SETTINGS)


def test_the_steps_are_those_of_pefts_own_loop(recipe, tmp_path, tiny_model_dir):
    """One batch a step: PEFT's forward adds its price to the loss of every batch."""
    seen, keep = [], AdapterTrainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        seen.append({name: inputs[name].clone() for name in ("input_ids", "labels")})
        return keep(self, model, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterTrainer, "training_step", training_step)
        method = {**METHOD, "lora_dropout": 0.0}
        asked = recipe(method, batch_size=1, packing=False, warmup_ratio=0, steps=6, weight_decay=0.1)
        result = train(asked, tmp_path / "out")
    set_seed(asked.seed)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    set_seed(asked.seed)
    model = peft.get_peft_model(model, asked.method.peft_config(6))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=asked.train.lr, weight_decay=0.1)
    losses = []
    for step, inputs in enumerate(seen):
        loss = model(**inputs).loss
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    rows = [row for row in result.metrics if "loss" in row]
    assert [row["loss"] + 0.5 * row["orthogonality"] for row in rows] == pytest.approx(losses, rel=1e-4)
    expected = peft.get_peft_model_state_dict(model)
    for name, value in tensors(result.adapter).items():
        torch.testing.assert_close(value, expected[name].detach(), atol=2e-4, rtol=2e-3)
    ranks = [len(value) for name, value in expected.items() if "lora_A" in name]
    assert sum(ranks) == 2 * len(ranks)
    assert len(set(ranks)) > 1


def test_a_training_that_ends_while_ranks_are_pruned_gives_the_adapter_that_was_measured(
    recipe, tmp_path, tiny_model_dir
):
    held_out = small_rows(tmp_path / "held_out.jsonl", 8, task="Repeat")
    data = {"held_out": str(held_out), "held_out_fraction": None}
    method = {**METHOD, "init_r": 8, "tinit": 0, "tfinal": 1, "deltaT": 4}
    result = train(recipe(method, data, steps=40, lr=0.1, eval_every=1, patience=4), tmp_path / "out")
    assert result.steps % 4, "the ranks that were pruned have not grown again"
    assert result.steps < 39
    model, tokenizer = load(tiny_model_dir)
    examples, _ = task_rows(tokenizer, held_out, model)
    saved = peft.PeftModel.from_pretrained(model, result.adapter)
    assert heldout_loss(saved, examples) == pytest.approx(result.held_out["after"], rel=1e-6)
