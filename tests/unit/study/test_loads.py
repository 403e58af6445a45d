"""What jobs will do, as the plan tells it: by hand, and held against what jobs really do."""

import dataclasses

import pytest

from hiplora.editing import EditSettings, EditTraining, load_edits, load_questions
from hiplora.editing.run import edit_groups
from hiplora.evaluation.suite import most_written, own_tasks
from hiplora.models.shapes import model_shape
from hiplora.recipes.load_study import load_study
from hiplora.study.builder import Study
from hiplora.study.engine.jobs import result
from hiplora.study.estimate import Load, full_settings, gpu
from hiplora.study.pico_data import write_pico_data
from hiplora.study.plan import job_costs
from hiplora.study.protocols import graph
from hiplora.study.steps import STEPS, lengths
from hiplora.study.steps.edit_load import stages_of
from hiplora.study.steps.loads import LOADS

DRIFT = {"texts": {"prose": "a.txt", "code": "b.txt"}, "tokens": 300, "window": 100}
METHOD = {"name": "hiplora", "preset": "paper"}
EDIT = {
    "method": {"name": "lora"},
    "edits": "builtin",
    "limit": 20,
    "mode": "batch",
    "edits_per_batch": 8,
    "steps": 10,
    "rows": 4,
    "questions": 5,
    "neighbours": False,
    "drift": None,
    "seed": 1,
}
PROBE = {
    "layers": [0, 1],
    "directions": 4,
    "kinds": ["zero", "noise_0.1"],
    "draws": 3,
    "tokens": 300,
    "seed": 0,
}


@pytest.fixture(scope="module")
def small():
    return model_shape("smollm2-135m")


def recipe(method=METHOD, data=None, **train):
    blocks = {"data": data or {"path": "gsm8k_train.jsonl.gz", "template": "direct"}, "method": method}
    return {
        **blocks,
        "train": {"steps": 10, "batch_size": 2, "gradient_accumulation": 3, "max_length": 128, **train},
    }


def test_every_kind_of_job_has_a_load_and_every_task_its_lengths():
    assert set(LOADS) == set(STEPS)
    assert set(lengths.TASKS) == set(own_tasks())
    assert lengths.EDITS["builtin"].rows == len(load_edits("builtin"))
    assert len(load_questions()) == lengths.QUESTION.rows


def test_a_whole_study_can_be_planned(tmp_path):
    write_pico_data(tmp_path)
    jobs = graph(Study(load_study("pico", []), tmp_path))
    costs = job_costs(jobs, "pico", gpu("A100-80GB"))
    assert all(costs[job.key].tokens > 0 for job in jobs if job.kind in ("train", "evaluate", "merge"))


def test_training_is_steps_of_full_sequences_of_which_a_share_is_learned(small):
    load = LOADS["train"]({"recipe": recipe()}, small)
    assert load.train_tokens == 10 * 2 * 3 * 128
    assert load.logit_positions == pytest.approx(0.062 * load.train_tokens, abs=1)
    assert (load.batch_tokens, load.sequence_length, load.train) == (256, 70, True)
    apart = LOADS["train"]({"recipe": recipe(packing=False)}, small)
    assert apart.train_tokens == 10 * 2 * 3 * 70


def test_epochs_become_steps_by_the_rows_of_the_file(small):
    data = {"path": "gsm8k_train.jsonl.gz", "template": "direct", "limit": 1000}
    load = LOADS["train"]({"recipe": recipe(data=data, epochs=2, steps=None)}, small)
    steps = load.train_tokens / (6 * 128)
    assert steps == pytest.approx(2 * 1000 * 69.3 / 128 / 6, rel=0.02)


def test_held_out_rows_are_read_before_and_after(small):
    data = {
        "path": "gsm8k_train.jsonl.gz",
        "template": "direct",
        "held_out_fraction": 0.1,
        "held_out_limit": 20,
    }
    assert LOADS["train"]({"recipe": recipe(data=data)}, small).forward_tokens == int(2 * 20 * 69.3)
    assert LOADS["train"]({"recipe": recipe()}, small).forward_tokens == 0


def test_an_adapter_leaves_its_numbers_its_factors_and_a_checkpoint(small):
    numbers, factors = small.trainable(full_settings(METHOD)), small.factor_scalars(full_settings(METHOD))
    assert LOADS["train"]({"recipe": recipe()}, small).disk_bytes == 4 * (numbers + factors + 3 * numbers)
    slim = LOADS["train"]({"recipe": recipe({**METHOD, "save_factors": False})}, small)
    assert slim.disk_bytes == 4 * 4 * numbers


def test_a_setting_that_is_yet_to_be_found_does_not_stop_the_plan(small):
    rate, price = result("rate", "value"), result("price", "value")
    load = LOADS["train"]({"recipe": recipe({**METHOD, "stability_weight": price}, lr=rate)}, small)
    assert load.train_tokens > 0


def test_measuring_speed_trains_for_warm_up_and_measured_steps_and_leaves_nothing(small):
    load = LOADS["speed"]({"recipe": recipe(), "warmup": 5, "steps": 20}, small)
    assert (load.train_tokens, load.disk_bytes) == (25 * 6 * 128, 0)


def test_scoring_reads_items_and_texts_and_writes_as_much_as_a_task_allows(small):
    settings = {"tasks": {"mmlu": 10, "humaneval_10": 2}, "drift": None, "seed": 0}
    load = LOADS["evaluate"](settings, small)
    assert most_written("humaneval_10") == (256, 10)
    assert most_written("mmlu") == (0, 1)
    assert load.generated_tokens == 2 * 10 * 256
    assert load.forward_tokens == 1064 + int(2 * (200.6 + 10 * 142.9))
    drifted = LOADS["merge"]({**settings, "drift": DRIFT}, small)
    assert drifted.forward_tokens - load.forward_tokens == 2 * 2 * 300
    apart = LOADS["merge"]({**settings, "drift": {**DRIFT, "documents": 7}}, small)
    assert apart.forward_tokens - load.forward_tokens == 2 * 2 * 7 * 100
    assert LOADS["evaluate"]({**settings, "tasks": {"mmlu": None}}, small).forward_tokens == int(
        14042 * 106.4
    )


def test_factors_take_decompositions_and_room_and_of_inputs_text_too(small):
    weight = LOADS["factorize"]({"method": METHOD}, small)
    assert weight.svd_flops > 0
    assert (weight.tokens, weight.disk_bytes) == (0, 4 * small.factor_scalars(full_settings(METHOD)))
    inputs = LOADS["factorize"]({"method": {"name": "hiplora", "calibration_tokens": 500}}, small)
    assert inputs.generated_tokens == 500
    assert (
        LOADS["inspect"]({"rank": 1000}, small).svd_flops > LOADS["inspect"]({"rank": 8}, small).svd_flops > 0
    )


@pytest.mark.parametrize(
    ("mode", "more"),
    [
        ("batch", {"edits_per_batch": 8}),
        ("sequential", {"edits_per_batch": 8}),
        ("batch", {}),
        ("single", {"sample": 3}),
        ("single", {}),
    ],
)
def test_editing_has_the_stages_that_a_run_has(mode, more):
    groups = edit_groups(20, mode, EditSettings(EditTraining(), **more))
    stages = stages_of({**EDIT, "edits_per_batch": None, "mode": mode, **more}, rows=20)
    assert (stages.count, stages.edits) == (len(groups), len(groups[0]))
    kept = [sum(map(len, groups[: n + 1])) if mode == "sequential" else len(g) for n, g in enumerate(groups)]
    assert stages.asked == sum(kept)


def test_editing_trains_and_asks_as_often_as_it_has_stages(small):
    load = LOADS["edit"](EDIT, small)
    assert load.train_tokens == 3 * 10 * 49  # 4 edits of 12.1 tokens a step
    assert load.generated_tokens == (20 + 3 * 8) * 2 * 13 + 5 * 4 * 10
    sequence = LOADS["edit"]({**EDIT, "mode": "sequential"}, small)
    assert sequence.generated_tokens - load.generated_tokens == (8 + 16 + 20 - 20) * 2 * 13
    near = LOADS["edit"]({**EDIT, "edits": "counterfact.jsonl.gz", "neighbours": True}, small)
    assert (
        near.forward_tokens > LOADS["edit"]({**EDIT, "edits": "counterfact.jsonl.gz"}, small).forward_tokens
    )
    search = LOADS["edit"]({**EDIT, "method": {"name": "alphaedit", "value_steps": 5, "prefixes": 2}}, small)
    assert search.train_tokens == 24 * 5 * 4 * (13 + 10)


def test_a_probe_reads_the_texts_under_every_intervention(small):
    settings = {**PROBE, "texts": DRIFT["texts"], "modules": None, "basis": "weight", "scores": {}}
    load = LOADS["probe"](settings, small)
    count = 2 * 4 * 4 * (1 + 3)  # layers, modules, directions, zero and three draws of noise
    assert load.forward_tokens == count * 2 * 2 * 300
    scored = LOADS["probe"]({**settings, "scores": {"mmlu": 10}}, small)
    assert scored.forward_tokens - load.forward_tokens == (count + 1) * 1064
    assert LOADS["probe"]({**settings, "basis": "activation"}, small).generated_tokens == 10_000
    assert LOADS["probe"]({**settings, "layers": None}, small).forward_tokens == 1.5 * load.forward_tokens


def test_loads_add_up_as_one_job():
    train = Load(train_tokens=100, logit_positions=10, batch_tokens=50, train=True, sequence_length=20)
    score = Load(forward_tokens=500, logit_positions=500, batch_tokens=80, sequence_length=40, disk_bytes=3)
    both = train + score
    assert both == score + train
    assert (both.tokens, both.train, both.batch_tokens, both.logit_positions) == (600, True, 50, 10)
    assert (both.sequence_length, both.disk_bytes) == (40, 3)
    assert score.times(3) == score + score + score
    assert Load() + score == dataclasses.replace(score)


def test_a_price_on_kl_reads_its_text_twice_a_step_and_samples_it_first(small):
    settings = recipe({"name": "lora"})
    plain = LOADS["train"]({"recipe": settings}, small)
    priced = LOADS["train"]({"recipe": recipe({"name": "lora"}, kl_weight=0.1, kl_tokens=100)}, small)
    assert priced.train_tokens - plain.train_tokens == 10 * 100
    assert priced.forward_tokens - plain.forward_tokens == 10 * 100
    assert (plain.generated_tokens, priced.generated_tokens) == (0, 10_000)
    named = recipe({"name": "lora"}, kl_weight=0.1, kl_text="a.txt")
    assert LOADS["train"]({"recipe": named}, small).generated_tokens == 0
