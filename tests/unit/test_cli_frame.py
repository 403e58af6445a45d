import json
import subprocess
import sys
import warnings

import pandas as pd
import pytest
from safetensors import SafetensorError
from typer import Option

from hiplora import __version__
from hiplora.cli import main as frame
from hiplora.cli.common import Group, as_command, told_to_repeat
from hiplora.errors import AdapterError, ConfigError, DataError

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "numpy", "scipy", "pandas", "matplotlib")


@pytest.fixture
def raising():
    """Register a command `boom` that raises what the test puts in."""
    box = {}

    def boom(times: int = 1):
        raise box["error"]

    frame.app.command(name="boom")(boom)
    yield box
    frame.app.registered_commands.pop()


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        frame.main(arguments)
    return stop.value.code or 0


def loaded_after(*arguments):
    script = (
        "import sys\nfrom hiplora.cli.main import main\n"
        f"try: main({list(arguments)!r})\nexcept SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def test_the_help_page_lists_the_commands_and_loads_no_heavy_library():
    assert loaded_after("--help") == "[]"


@pytest.mark.parametrize("name", [command.name for command in frame.app.registered_commands])
def test_a_commands_help_loads_no_heavy_library(name):
    assert loaded_after(name, "--help") == "[]"


def test_help_version_and_the_module_form_succeed(capsys):
    assert run("--help") == 0
    assert "Fine-tune without breaking" in capsys.readouterr().out
    assert run("--version") == 0
    assert capsys.readouterr().out == f"hiplora {__version__}\n"
    done = subprocess.run([sys.executable, "-m", "hiplora", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"hiplora {__version__}\n"


def test_an_unknown_command_or_option_is_wrong_usage(capsys, raising):
    assert run("nope") == 2
    assert "No such command" in capsys.readouterr().err
    assert run("boom", "--nope") == 2
    assert "No such option" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("field r: got 0, expected 1 or more"), 2),
        (DataError("x.jsonl, line 3: no field 'prompt'"), 2),
        (AdapterError("module q_proj does not fit"), 1),
        (OSError(28, "No space left on device", "out/x"), 1),
    ],
)
def test_an_explained_failure_is_one_line_and_an_exit_status(raising, capsys, error, status):
    raising["error"] = error
    assert run("boom") == status
    captured = capsys.readouterr()
    assert captured.err == f"error: {error}\n"
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "shown"), [(["boom"], "warning: few tokens\n"), (["boom", "--debug"], "x.py:3: ")]
)
def test_a_warning_is_one_line_without_the_place_in_the_code(raising, capsys, arguments, shown):
    class Warned(ConfigError):
        def __str__(self):
            return warnings.formatwarning("few tokens", UserWarning, "x.py", 3)

    raising["error"] = Warned()
    run(*arguments)
    assert f"error: {shown}" in capsys.readouterr().err
    assert warnings.formatwarning("few", UserWarning, "x.py", 3).startswith("x.py:3: ")


def test_ctrl_c_says_that_the_same_command_continues(capsys):
    with pytest.raises(KeyboardInterrupt), told_to_repeat("runs/compare"):
        raise KeyboardInterrupt
    assert "repeat the command (without --overwrite) to continue in runs/compare" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:862] . PytorchStreamWriter failed writing file data/0"),
    ],
)
def test_a_disk_too_full_for_tensors_is_no_bug(raising, capsys, error):
    raising["error"] = error
    assert run("boom") == 1
    assert capsys.readouterr().err.startswith("error: cannot write a file of tensors (")


def test_a_missing_package_is_named_with_the_way_to_install_it(raising, capsys):
    raising["error"] = ModuleNotFoundError("No module named 'trl'", name="trl")
    assert run("boom") == 1
    assert capsys.readouterr().err == "error: trl is not installed; run: pip install 'hiplora[train]'\n"


@pytest.mark.parametrize("arguments", [("--debug", "boom"), ("boom", "--debug")])
def test_debug_before_or_after_the_command_shows_the_traceback(raising, capsys, arguments):
    raising["error"] = ConfigError("wrong")
    assert run(*arguments) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_is_one_line_that_says_so_and_debug_shows_its_traceback(raising, capsys):
    raising["error"] = ZeroDivisionError("division by zero")
    assert run("boom") == 1
    said = capsys.readouterr().err
    assert said.startswith("error: unexpected ZeroDivisionError (division by zero); this is a bug")
    assert said.count("\n") == 1
    assert run("boom", "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_leaves_with_130(raising):
    raising["error"] = KeyboardInterrupt()
    assert run("boom") == 130


def test_a_command_prints_its_record_with_json_and_else_lines_and_tables_with_brackets_as_they_are(capsys):
    def given(rank: int = Option(8)):
        return rank

    def command(settings=Group(given)):
        yield {"rank": settings}
        yield "Layers [fp32]", ["name", "rank"], [["model.layers[0]", settings]]
        yield "Drift", pd.DataFrame({"method": ["LoRA [r=4]"], "KL": [0.123456], "seconds": [None]})
        yield "done"

    frame.app.command(name="boom")(as_command(command))
    try:
        assert run("boom", "--rank", "7", "--json") == 0
        assert json.loads(capsys.readouterr().out) == {"rank": 7}
        assert run("boom") == 0
        said = capsys.readouterr().out
    finally:
        frame.app.registered_commands.pop()
    for text in ("Layers [fp32]", "model.layers[0]", " 8 ", "Drift", "LoRA [r=4]", "0.123", "–", "done"):
        assert text in said
