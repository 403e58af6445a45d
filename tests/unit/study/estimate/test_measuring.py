"""A machine is measured once, on a model's architecture, and read from the cache afterwards."""

import dataclasses
import json

import pytest
import torch

from hiplora.errors import ConfigError
from hiplora.files import cache_dir
from hiplora.models.shapes import model_config, shape_of
from hiplora.study.estimate import measure_machine, measuring


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HIPLORA_CACHE", str(tmp_path))


def test_a_measurement_has_rates_of_everything_and_says_what_they_are(tiny_model_dir):
    machine = measure_machine(str(tiny_model_dir), rounds=1)
    for field in ("train_flops_per_s", "forward_flops_per_s", "decode_bytes_per_s", "svd_flops_per_s"):
        assert getattr(machine, field) > 0
    assert machine.memory_bytes > 1 << 28
    assert machine.basis.startswith("measured 20")
    assert "2 layers of llama 64 wide" in machine.basis


def test_a_second_measurement_is_read_from_the_cache(tiny_model_dir, monkeypatch):
    first = measure_machine(str(tiny_model_dir), rounds=1)
    monkeypatch.setattr(measuring, "_measured", lambda *_: pytest.fail("measured again"))
    assert measure_machine(str(tiny_model_dir)) == first


def test_other_threads_versions_or_a_refresh_are_measured_anew(tiny_model_dir, monkeypatch):
    calls = []

    def measured(config, rounds):
        calls.append(rounds)
        return machine

    machine = measure_machine(str(tiny_model_dir), rounds=1)
    monkeypatch.setattr(measuring, "_measured", measured)
    measure_machine(str(tiny_model_dir), refresh=True)
    monkeypatch.setattr(measuring, "_threads", lambda: 77)
    measure_machine(str(tiny_model_dir))
    monkeypatch.setattr(measuring, "provenance", lambda: {"libraries": {"torch": "0"}, "machine": {}})
    measure_machine(str(tiny_model_dir))
    assert len(calls) == 3


@pytest.mark.parametrize("content", ["", "{", "[]", '{"name": "x"}'])
def test_a_damaged_measurement_is_made_again(tiny_model_dir, content, monkeypatch):
    machine = measure_machine(str(tiny_model_dir), rounds=1)
    (path,) = (cache_dir() / "machines").glob("*.json")
    path.write_text(content)
    monkeypatch.setattr(measuring, "_measured", lambda *_: machine)
    assert measure_machine(str(tiny_model_dir)) == machine
    assert json.loads(path.read_text()) == dataclasses.asdict(machine)


def test_the_random_state_is_left_as_it_was(tiny_model_dir):
    state = torch.random.get_rng_state()
    measure_machine(str(tiny_model_dir), rounds=1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_small_model_is_timed_whole_and_a_large_one_on_some_of_its_layers():
    assert shape_of(measuring._stand_in(model_config("smollm2-135m"))).parameters == 134_515_008
    whole = model_config("meta-llama/Llama-3.1-8B")
    part = shape_of(measuring._stand_in(whole))
    assert part.layers == 1
    assert part.modules["model.layers.0.mlp.up_proj"] == (14336, 4096)
    assert part.parameters < 1_000_000_000
    assert whole.num_hidden_layers == 32


def test_a_model_that_cannot_be_found_is_not_measured():
    with pytest.raises(ConfigError, match="some-one/some-model"):
        measure_machine("some-one/some-model")


def test_the_quickest_run_after_the_first_counts(monkeypatch):
    times = iter([1.0, 5.0, 4.0])
    monkeypatch.setattr(measuring, "_seconds", lambda work: next(times))
    assert measuring._rates({"job": (lambda: None, 20.0)}, rounds=2) == {"job": 5.0}


def test_a_slow_machine_is_timed_twice_at_least_and_not_much_longer(monkeypatch):
    clock, runs = iter(range(0, 10_000, 100)), []
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: float(next(clock)))
    measuring._rates({"job": (lambda: runs.append(1), 1.0)}, rounds=50)
    assert len(runs) == 2


def test_a_container_s_limit_is_its_memory(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(measuring, "CGROUP_LIMIT", limit)
    limit.write_text("12345\n")
    assert measuring.memory_here() == 12345
    limit.write_text("max\n")
    assert measuring.memory_here() > 12345
