"""The import check must catch what it is for."""

from pathlib import Path

import pytest

from tools.check_imports import LAYERS, main, violations

SOURCE = Path(__file__).resolve().parents[2] / "src"
UPWARDS, FRONT_DOOR, INSIDE = "is not below it", "import it from its own room", "inside the command"


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


@pytest.mark.parametrize(
    ("path", "text", "said"),
    [
        ("spectral/x.py", "from hiplora.tuner import layer", UPWARDS),
        ("spectral/x.py", "import hiplora.tuner.layer", UPWARDS),
        ("spectral/x.py", "from .. import tuner", UPWARDS),
        ("spectral/x.py", "def f():\n    from hiplora.tuner import layer", UPWARDS),
        ("files.py", "from hiplora.cli import main", UPWARDS),
        ("attic/x.py", "from hiplora.errors import ConfigError", "attic is in no layer"),
        ("training/x.py", "from hiplora import HipLoraConfig", FRONT_DOOR),
        ("spectral/x.py", "def f():\n    from peft.something import x", "spectral imports peft"),
        ("metrics/x.py", "import torch", "metrics imports torch"),
        ("cli/x.py", "import torch.nn", INSIDE),
        ("cli/x.py", "class A:\n    import numpy as np", INSIDE),
    ],
)
def test_an_import_that_a_room_must_not_have_is_found_however_it_is_written(tree, path, text, said):
    (found,) = tree(path, text)
    assert found.startswith(f"{path}:")
    assert said in found


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("cli/x.py", "from hiplora.study import plan"),
        ("cli/x.py", "def command():\n    import torch"),
        ("tuner/x.py", "from hiplora.spectral import retract\nfrom .layer import Layer\nimport peft"),
        ("spectral/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from hiplora.tuner import x"),
        ("__init__.py", "from hiplora.tuner import HipLoraConfig"),
    ],
)
def test_an_import_downwards_is_fine(tree, path, text):
    assert tree(path, text) == []


def test_the_project_keeps_its_rules_and_the_script_fails_with_the_place_of_a_violation(tree, tmp_path, capsys):
    tree("spectral/x.py", "\n\nimport peft")
    assert main([str(tmp_path)]) == 1
    assert "x.py:3: spectral imports peft" in capsys.readouterr().out
    assert main([str(SOURCE)]) == 0
