"""Which GPU each worker gets; what workers do is shown on real ones (integration)."""

import io
from pathlib import Path

import pytest
import torch

from hiplora.study.engine import local
from hiplora.study.engine.bench import Place
from hiplora.study.engine.jobs import Graph
from hiplora.study.engine.store import Store


class Process:
    """A worker that lives until it is told to end."""

    def __init__(self, command, env, **_):
        self.pid, self.device, self.code = id(self), env.get("CUDA_VISIBLE_DEVICES"), None
        self.stdin, self.stdout = io.BytesIO(), iter(())

    def poll(self):
        return self.code

    def wait(self):
        return 0

    def terminate(self):
        self.code = 0


@pytest.fixture
def crew(tmp_path, monkeypatch):
    monkeypatch.setattr(local.subprocess, "Popen", Process)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def made(count, visible=None):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        return local._Crew(Store(tmp_path), Place("pico"), "run", Graph([]), 3)

    return made


def test_workers_are_spread_over_the_gpus_and_a_new_one_takes_the_place_of_the_dead(crew):
    found = crew(2)
    for _ in range(3):
        found.start()
    assert [process.device for process in found._members] == ["0", "1", "0"]
    found._members[1].code = -9
    found.start()
    assert found._members[-1].device == "1"


def test_gpus_that_are_hidden_stay_so(crew):
    found = crew(2, visible="3,5")
    found.start()
    found.start()
    assert [process.device for process in found._members] == ["3", "5"]


@pytest.mark.parametrize("count", [0, 1])
def test_without_a_choice_the_environment_is_left_alone(crew, count):
    found = crew(count)
    found.start()
    assert found._members[0].device is None


def test_a_place_for_other_folders_has_whole_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "data").mkdir()
    found = Place("model", Path("data"), True).absolute()
    assert found == Place(str(tmp_path / "model"), tmp_path / "data", True)
    assert Place("smollm2-135m").absolute() == Place("smollm2-135m")
