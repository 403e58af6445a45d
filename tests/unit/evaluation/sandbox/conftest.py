"""Every way to isolate a program that this machine has, so that what stands in for a guard is tested as well."""

import os
import time
import uuid
from pathlib import Path

import pytest

from hiplora.evaluation.sandbox.batch import run_batch
from hiplora.evaluation.sandbox.isolation import active_layers
from hiplora.evaluation.sandbox.limits import Limits

WALLS = {
    "every guard": None,
    "no namespaces": ("account", "seccomp", "landlock"),
    "limits only": (),
    "mount namespace": ("user", "mount"),
    "process namespace": ("user", "pid"),
    "network namespace": ("user", "network"),
    "system call filter": ("seccomp",),
    "Landlock": ("landlock",),
    "own user account": ("account",),
}


@pytest.fixture(autouse=True)
def _posix():
    if os.name != "posix":
        pytest.skip("the sandbox needs Linux or macOS")


@pytest.fixture
def walled(request):
    """Run a program behind the walls that the test's parameter names, all of which must be there."""
    wanted = WALLS[request.param]
    layers = active_layers() if wanted is None else frozenset(wanted)
    if request.param == "no namespaces":  # an ordinary user needs no other account
        layers &= active_layers()
    if absent := layers - active_layers():
        pytest.skip(f"this machine does not give: {', '.join(sorted(absent))}")

    def run(source, **limits):
        return run_batch([source], Limits(**limits), layers)[0]

    run.layers = layers
    return run


def behind(*walls):
    """Run the test once behind each of these walls."""
    return pytest.mark.parametrize("walled", walls, indirect=True)


class Marked:
    """Processes that carry a mark, whoever their parent is. `source` marks the program that begins with it."""

    def __init__(self):
        if not Path("/proc/self/comm").exists():
            pytest.skip("looks for processes in /proc")
        self.name = f"hip{uuid.uuid4().hex[:10]}"
        self.source = (
            f"import ctypes, os, signal, time\nctypes.CDLL(None).prctl(15, b{self.name!r}, 0, 0, 0)\n"
        )

    def alive(self):
        return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/comm") if self._is_marked(path)]

    def _is_marked(self, path):
        try:
            state = path.with_name("stat").read_text().rpartition(")")[2].split()[0]
            return path.read_text().strip() == self.name and state != "Z"
        except OSError:
            return False


@pytest.fixture
def marked():
    """Have `Marked`, and kill what a broken sandbox left behind."""
    marked = Marked()
    yield marked
    for pid in marked.alive():
        os.kill(pid, 9)


def eventually(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()
