"""What jobs cost: operations, seconds and bytes grow with what is done and agree with counts made by hand."""

import dataclasses
import inspect

import pytest
from torch.utils.flop_counter import FlopCounterMode

from hiplora.errors import ConfigError
from hiplora.models.shapes import model_shape
from hiplora.spectral import decompose
from hiplora.study.estimate import (
    GPUS,
    Cost,
    Load,
    Machine,
    adapter_elements,
    calibration_load,
    cost,
    factoring,
    flops,
    full_settings,
    gpu,
    memory,
    svd_load,
)
from hiplora.training import trainer
from hiplora.tuner import calibration, inputs
from tests.tiny import tiny_llama

PAPER = {"name": "hiplora", "preset": "paper"}
MACHINE = Machine("plain", 1e12, 2e12, 1e11, 1e11, 1 << 34, 4)
LLAMA = "meta-llama/Llama-3.1-8B"


@pytest.fixture
def small():
    return model_shape("smollm2-135m")


@pytest.fixture
def large():
    return model_shape(LLAMA)


def test_forward_operations_are_those_that_torch_counts(tiny_model_dir):
    import torch

    shape, model = model_shape(str(tiny_model_dir)), tiny_llama()
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(3, 40, dtype=torch.long))
    # Eager attention computes all of the square, of which a causal model needs half.
    predicted = flops.forward(shape, 120, 120, 40) + 120 * flops.attention(shape, 20)
    assert counter.get_total_flops() == pytest.approx(predicted, rel=0.02)


def test_training_operations_are_those_that_torch_counts(tiny_model_dir):
    import torch
    from peft import LoraConfig, get_peft_model

    shape, model = model_shape(str(tiny_model_dir)), tiny_llama()
    model.set_attn_implementation("eager")
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    ids = torch.zeros(3, 40, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        adapted(input_ids=ids, labels=ids).loss.backward()
    count = shape.trainable(full_settings({"name": "lora", "r": 8, "target_modules": "all-linear"}))
    predicted = flops.training(shape, 120, 120, 40, count) + 3 * 120 * flops.attention(shape, 20)
    assert counter.get_total_flops() == pytest.approx(predicted, rel=0.05)


def test_scoring_a_thousand_tokens_of_the_8b_model_by_hand(large):
    body = 8_030_261_248 - 2 * 128_256 * 4096
    by_hand = 1000 * (2 * body + 4 * 32 * 4096 * 256) + 10 * 2 * 4096 * 128_256
    found = cost(Load(forward_tokens=1000, logit_positions=10, sequence_length=512), large, MACHINE)
    assert found.flops == pytest.approx(by_hand)
    assert found.seconds == pytest.approx(by_hand / 2e12)
    assert found.tokens == 1000


def test_training_takes_twice_the_operations_of_reading_and_more(large):
    read = cost(Load(forward_tokens=1000, logit_positions=1000), large, MACHINE)
    trained = cost(Load(train_tokens=1000, logit_positions=1000, train=True), large, MACHINE)
    assert 2 * read.flops < trained.flops < 2.2 * read.flops


def test_checkpointing_costs_a_third_pass_and_saves_memory(large):
    plain = Load(train_tokens=4096, logit_positions=64, batch_tokens=4096, train=True)
    saving = dataclasses.replace(plain, checkpointing=True)
    assert cost(saving, large, MACHINE).flops == pytest.approx(
        1.5 * cost(plain, large, MACHINE).flops, rel=0.03
    )
    assert cost(saving, large, MACHINE).memory_bytes < 0.7 * cost(plain, large, MACHINE).memory_bytes


WORK = {
    "train_tokens": 1000,
    "forward_tokens": 1000,
    "generated_tokens": 1000,
    "logit_positions": 1000,
    "svd_flops": 1e12,
}


@pytest.mark.parametrize(("field", "amount"), WORK.items())
def test_more_work_takes_more_operations_and_time(small, field, amount):
    base = Load(**{name: value for name, value in WORK.items() if name != "logit_positions"})
    more = dataclasses.replace(base, **{field: getattr(base, field) + amount})
    before, after = cost(base, small, MACHINE), cost(more, small, MACHINE)
    assert after.flops > before.flops
    assert after.seconds > before.seconds


@pytest.mark.parametrize(
    "change",
    [
        {"batch_tokens": 2048},
        {"logit_positions": 2000},
        {"factor_scalars": 10**6},
        {"adapter_elements": 10**6},
    ],
)
def test_more_at_once_takes_more_memory(small, change):
    base = Load(train_tokens=2000, logit_positions=1000, batch_tokens=1024, train=True)
    assert (
        cost(dataclasses.replace(base, **change), small, MACHINE).memory_bytes
        > cost(base, small, MACHINE).memory_bytes
    )


def test_an_adapter_takes_sixteen_bytes_a_parameter_in_training_and_four_afterwards(small):
    train, score = Load(train=True), Load()
    for load, size in ((train, 16), (score, 4)):
        extra = cost(load, small, MACHINE, 1000).memory_bytes - cost(load, small, MACHINE).memory_bytes
        assert extra == 1000 * size


def test_logits_beyond_the_limit_of_training_are_made_in_tiles(small):
    load = Load(train_tokens=9000, logit_positions=9000, batch_tokens=9000, train=True)
    assert 9000 < memory.LOGITS_LIMIT / small.vocabulary < 12_000
    more = dataclasses.replace(load, train_tokens=12_000, logit_positions=12_000, batch_tokens=12_000)
    whole, tiled = (memory._logit_bytes(case, small, tiled_head=False) for case in (load, more))
    assert whole == 4 * 5 * 9000 * small.vocabulary
    assert tiled == 4 * 5 * 12_000 * memory.TILE


def test_memory_holds_the_weights_and_what_the_process_takes(large):
    machine = dataclasses.replace(MACHINE, dtype_bytes=2, runtime_bytes=1000)
    assert cost(Load(), large, machine).memory_bytes == 2 * large.parameters + 1000


def test_generating_is_bound_by_the_bandwidth_where_texts_are_few(large):
    load = Load(generated_tokens=800, decode_batch=8, sequence_length=0)
    found = cost(load, large, dataclasses.replace(MACHINE, forward_flops_per_s=1e15))
    assert found.seconds == pytest.approx(100 * 4 * large.parameters / 1e11, rel=1e-6)


def test_generating_is_bound_by_the_operations_where_texts_are_many(large):
    load = Load(generated_tokens=4096, decode_batch=4096, sequence_length=0)
    found = cost(load, large, MACHINE)
    assert found.seconds == pytest.approx(found.flops / 2e12)


def test_generating_takes_the_least_time_of_a_layer(small):
    machine = dataclasses.replace(
        MACHINE, decode_bytes_per_s=1e18, forward_flops_per_s=1e18, layer_seconds=0.5
    )
    assert cost(Load(generated_tokens=16, decode_batch=8), small, machine).seconds == pytest.approx(
        2 * 30 * 0.5
    )


def test_the_overhead_and_the_disk_are_passed_on(small):
    found = cost(Load(seconds=12.5, disk_bytes=77), small, MACHINE)
    assert (found.seconds, found.disk_bytes, found.flops, found.tokens) == (12.5, 77, 0.0, 0)


def test_costs_add_up_and_the_largest_memory_stays():
    assert Cost(1, 2, 30, 4, 5) + Cost(10, 20, 3, 40, 50) == Cost(11, 22, 30, 44, 55)
    assert sum([Cost(1, 2, 3, 4, 5)], Cost()) == Cost(1, 2, 3, 4, 5)


@pytest.mark.parametrize("values", [{"train_tokens": -1}, {"seconds": -0.5}, {"decode_batch": 0}])
def test_a_load_below_nothing_is_refused(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        Load(**values)


def test_decompositions_of_plain_lora_are_none_and_of_pissa_dearer_than_of_hiplora(large):
    assert svd_load(large, {"name": "lora"}) == 0
    assert svd_load(large, {"name": "pissa"}) > 5 * svd_load(large, PAPER) > 0


def test_starts_inside_the_weights_are_counted(small):
    full = svd_load(small, {"name": "pissa"})
    assert svd_load(small, {"name": "milora"}) == full < svd_load(small, {"name": "corda"})
    assert 0 < svd_load(small, {"name": "lora_null", "r": 4}) < full
    for name in ("corda", "lora_null"):
        load = calibration_load(small, {"name": name, "calibration_tokens": 9000})
        assert (load.generated_tokens, load.forward_tokens, load.train_tokens, load.train) == (
            9000,
            9000,
            0,
            False,
        )
        load = calibration_load(small, {"name": name, "calibration_text": "some.txt"})
        assert (load.generated_tokens, load.factor_scalars) == (0, 0)
    assert calibration_load(small, {"name": "milora"}) == Load(svd_flops=full)


def test_decompositions_grow_with_the_rank_and_the_targets(large):
    more = {**PAPER, "principal_rank": 64}
    wider = {**PAPER, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]}
    assert svd_load(large, PAPER) < svd_load(large, more)
    assert svd_load(large, PAPER) < svd_load(large, wider)


def test_small_weights_are_decomposed_through_their_gram_matrix():
    assert factoring.truncated_flops(576, 576, 32) == pytest.approx(
        2 * 576**3 + 9 * 576**3 + 6 * 576 * 576 * 32
    )


def test_layers_with_the_same_input_share_its_moment(small):
    gate = {"name": "hiplora", "basis_sides": "input", "target_modules": ["gate_proj"]}
    both = {**gate, "target_modules": ["gate_proj", "up_proj"]}
    down = {**gate, "target_modules": ["down_proj"]}
    assert svd_load(small, both) < 1.1 * svd_load(small, gate)
    assert svd_load(small, down) > 5 * svd_load(small, gate)


def test_a_calibration_samples_reads_and_measures_gradients(small):
    load = calibration_load(small, {"name": "hiplora", "calibration_tokens": 9000})
    assert (load.generated_tokens, load.forward_tokens, load.train_tokens) == (9000, 9000, 4096)
    assert load.svd_flops == svd_load(small, {"name": "hiplora", "calibration_tokens": 9000})
    text = {"name": "hiplora", "calibration_text": "some.txt", "basis_sides": "input"}
    load = calibration_load(small, text)
    assert (load.generated_tokens, load.train_tokens, load.train) == (0, 0, False)


def test_the_weight_basis_needs_no_text(small):
    assert calibration_load(small, PAPER) == Load(svd_flops=svd_load(small, PAPER))


def test_dropout_leaves_more_behind_than_its_absence(small):
    without = adapter_elements(small, {"name": "lora", "lora_dropout": 0.0})
    assert without == 30 * 4 * (576 + 16)
    assert adapter_elements(small, {"name": "lora"}) == 30 * 4 * (2 * 576 + 16)
    assert adapter_elements(small, PAPER) == 30 * 4 * (576 + 144 + 16)


def test_settings_that_are_no_method_are_refused(small):
    with pytest.raises(ConfigError, match="principal_rank"):
        svd_load(small, {"name": "lora", "principal_rank": 3})
    with pytest.raises(ConfigError, match="method"):
        svd_load(small, {"name": "nothing"})


@pytest.mark.parametrize(
    "name", ["h100", "h200", "a100-80gb", "a100-40gb", "l40s", "a10g", "rtx4090", "t4", "mi300x"]
)
def test_named_gpus_say_what_they_assume(name):
    machine = gpu(name.upper())
    assert machine is GPUS[name]
    assert machine.train_flops_per_s < machine.forward_flops_per_s < 1.4e15
    assert "assumed" in machine.basis
    assert "not measured" in machine.basis


def test_a_gpu_that_is_not_in_the_table_is_refused_with_those_that_are():
    with pytest.raises(ConfigError, match="'h1000': is not in the table; expected one of h100, h200"):
        gpu("h1000")


def test_an_h100_trains_the_8b_model_at_a_speed_and_in_memory_that_are_seen_in_practice(large):
    load = Load(
        train_tokens=10**6,
        logit_positions=10**6,
        batch_tokens=8192,
        train=True,
        sequence_length=2048,
        adapter_elements=adapter_elements(large, PAPER),
    )
    found = cost(load, large, gpu("h100"))
    assert 7_000 < 10**6 / found.seconds < 14_000  # tokens a second
    assert 60 << 30 < found.memory_bytes < 80 << 30  # the paper's run takes 78 GB


def test_constants_of_the_estimate_are_those_of_what_it_estimates():
    assert memory.LOGITS_LIMIT == trainer.LOGITS_LIMIT
    assert factoring.EXACT_SIZE == decompose._EXACT_SIZE
    assert factoring.EXACT_SIZE_PER_RANK == decompose._EXACT_SIZE_PER_RANK
    assert factoring.SAMPLED_AT_ONCE == inputs._SAMPLED_AT_ONCE
    defaults = inspect.signature(calibration.calibrate).parameters
    assert defaults["gradient_tokens"].default == factoring.GRADIENT_TOKENS
