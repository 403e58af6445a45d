"""The import check must catch what it is for."""

from pathlib import Path

import pytest

from tools.check_imports import LAYERS, main, violations

SOURCE = Path(__file__).resolve().parents[2] / "src"


@pytest.fixture
def tree(tmp_path):
    """A function that writes one file of a package `hiplora` and returns the violations found."""

    def write(path: str, text: str) -> list[str]:
        for room in set().union(*LAYERS):
            (tmp_path / "hiplora" / room).mkdir(parents=True, exist_ok=True)
        file = tmp_path / "hiplora" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return [line.removeprefix(f"{tmp_path}/hiplora/") for line in violations(tmp_path)]

    return write


def test_the_project_keeps_its_own_rules():
    assert violations(SOURCE) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("spectral/x.py", "from hiplora.tuner import layer"),
        ("spectral/x.py", "import hiplora.tuner.layer"),
        ("spectral/x.py", "from hiplora import tuner"),
        ("spectral/x.py", "from ..tuner import layer"),
        ("spectral/x.py", "from .. import tuner"),
        ("spectral/x.py", "def f():\n    from hiplora.tuner import layer"),
        ("merging/x.py", "from hiplora.training import train"),
        ("files.py", "from hiplora.cli import main"),
    ],
)
def test_an_import_upwards_or_sideways_is_found_however_it_is_written(tree, path, text):
    (found,) = tree(path, text)
    assert found.startswith(f"{path}:")
    assert "is not below it" in found


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("cli/x.py", "from hiplora.study import plan"),
        ("cli/x.py", "def command():\n    import torch"),
        ("tuner/x.py", "from hiplora.spectral import retract\nfrom .layer import Layer\nimport peft"),
        ("files.py", "from hiplora.errors import ConfigError"),
        (
            "spectral/x.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from hiplora.tuner import x",
        ),
        ("__init__.py", "from hiplora.tuner import HipLoraConfig"),
    ],
)
def test_an_import_downwards_is_fine(tree, path, text):
    assert tree(path, text) == []


def test_a_room_without_a_layer_is_found(tree):
    (found,) = tree("attic/x.py", "from hiplora.errors import ConfigError")
    assert "attic is in no layer" in found


def test_the_front_door_is_for_users_only(tree):
    (found,) = tree("training/x.py", "from hiplora import HipLoraConfig")
    assert "import it from its own room" in found


@pytest.mark.parametrize(
    ("room", "library"), [("spectral", "peft"), ("spectral", "transformers"), ("metrics", "torch")]
)
def test_the_mathematics_knows_no_framework_above_it(tree, room, library):
    (found,) = tree(f"{room}/x.py", f"def f():\n    from {library}.something import x")
    assert f"{room} imports {library}" in found


def test_a_command_module_that_loads_torch_with_itself_is_found(tree):
    assert "inside the command" in tree("cli/x.py", "import torch.nn")[0]
    assert "inside the command" in tree("cli/x.py", "class A:\n    import numpy as np")[0]


def test_the_script_fails_with_the_place_of_the_violation(tree, tmp_path, capsys):
    tree("spectral/x.py", "\n\nimport peft")
    assert main([str(tmp_path)]) == 1
    assert "x.py:3: spectral imports peft" in capsys.readouterr().out
    assert main([str(SOURCE)]) == 0
