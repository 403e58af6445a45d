"""A library that is not installed is named together with the extra that brings it."""

import subprocess
import sys

import pytest

WITHOUT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == {library!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
sys.modules.pop({library!r}, None)
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == {library!r} else found(name, package)
"""


def run(library: str, code: str) -> subprocess.CompletedProcess:
    program = WITHOUT.format(library=library) + code
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("library", "room", "extra"),
    [("trl", "training", "train"), ("matplotlib", "reporting", "reports"), ("trl", "editing", "train")],
)
def test_a_room_names_the_extra_that_it_needs(library, room, extra):
    done = run(library, f"import hiplora.{room}")
    assert f"{library} is not installed; run: pip install 'hiplora[{extra}]'" in done.stderr


def test_the_command_names_its_extra_without_a_traceback():
    done = run("typer", "from hiplora.__main__ import main; main()")
    assert done.returncode == 1
    assert done.stderr == "error: typer is not installed; run: pip install 'hiplora[cli]'\n"
