import io
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
from tests.commands import run

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "numpy", "scipy", "pandas", "matplotlib")


@pytest.fixture
def boom(capsys):
    """Run a command `boom` that raises an error, or is one that is given: exit status, output and errors."""

    def call(what, *arguments):
        def command(times: int = 1):
            raise what

        frame.app.command(name="boom")(command if isinstance(what, BaseException) else what)
        try:
            return run(capsys, *(arguments or ["boom"]))
        finally:
            frame.app.registered_commands.pop()

    return call


def test_no_help_page_loads_a_heavy_library():
    script = f"""
import sys
from hiplora.cli.main import app, main
for words in [[], *([command.name] for command in app.registered_commands)]:
    try: main([*words, "--help"])
    except SystemExit: pass
    print("loaded", words, [name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    pages = [line for line in done.stdout.splitlines() if line.startswith("loaded")]
    assert len(pages) == 1 + len(frame.app.registered_commands)
    assert [page for page in pages if not page.endswith("[]")] == []


def test_help_version_and_the_module_form_succeed(capsys):
    assert "Fine-tune without breaking" in run(capsys, "--help")[1]
    assert run(capsys, "--version") == (0, f"hiplora {__version__}\n", "")
    done = subprocess.run([sys.executable, "-m", "hiplora", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"hiplora {__version__}\n"


UNWRITTEN = "cannot write a file of tensors ("


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ConfigError("field r: got 0, expected 1 or more"), 2, "field r: got 0, expected 1 or more\n"),
        (DataError("x.jsonl, line 3: no field 'prompt'"), 2, "x.jsonl, line 3: no field 'prompt'\n"),
        (AdapterError("module q_proj does not fit"), 1, "module q_proj does not fit\n"),
        (OSError(28, "No space left on device", "x"), 1, "[Errno 28] No space left on device: 'x'\n"),
        (SafetensorError("Error while serializing: I/O error: No space left on device"), 1, UNWRITTEN),
        (RuntimeError("[enforce fail at x.cc:862] . PytorchStreamWriter failed writing file"), 1, UNWRITTEN),
        (ModuleNotFoundError(name="trl"), 1, "trl is not installed; run: pip install 'hiplora[train]'\n"),
        (ZeroDivisionError("by zero"), 1, "unexpected ZeroDivisionError (by zero); this is a bug"),
    ],
)
def test_a_failure_is_one_line_and_an_exit_status_and_debug_adds_its_traceback(boom, error, status, said):
    code, out, shown = boom(error)
    assert (code, out, shown.count("\n")) == (status, "", 1)
    assert shown.startswith(f"error: {said}")
    for words in (("--debug", "boom"), ("boom", "--debug")):
        code, _, shown = boom(error, *words)
        assert code == status
        assert "Traceback" in shown


@pytest.mark.parametrize(("words", "shown"), [(["boom"], "warning: few\n"), (["boom", "--debug"], "x.py:3: ")])
def test_a_warning_is_one_line_without_the_place_in_the_code(boom, words, shown):
    class Warned(ConfigError):
        def __str__(self):
            return warnings.formatwarning("few", UserWarning, "x.py", 3)

    assert f"error: {shown}" in boom(Warned(), *words)[2]
    assert warnings.formatwarning("few", UserWarning, "x.py", 3).startswith("x.py:3: ")


def test_an_output_that_lacks_a_character_gets_a_question_mark(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="cp1252", errors="strict"))
    with pytest.raises(SystemExit) as stop:
        frame.main(["probe", "--help"])
    assert not stop.value.code
    assert b"as a share of ?." in b" ".join(written.getvalue().split())


def test_an_input_that_is_not_utf_8_is_read(monkeypatch, boom):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    assert boom(lambda: print(input()))[:2] == (0, "caf\ufffd\n")


def test_the_notes_of_libraries_to_each_other_are_shown_with_debug_only(boom, recwarn):
    class Noted(ConfigError):
        def __str__(self):
            warnings.warn("is deprecated", FutureWarning, stacklevel=2)
            return "no"

    for words, shown in ((["boom"], False), (["boom", "--debug"], True)):
        boom(Noted(), *words)
        assert bool(len(recwarn)) == shown


def test_ctrl_c_leaves_with_130_and_says_that_the_same_command_continues(boom, capsys):
    assert boom(KeyboardInterrupt())[0] == 130
    with pytest.raises(KeyboardInterrupt), told_to_repeat("runs/compare"):
        raise KeyboardInterrupt
    assert "repeat the command (without --overwrite) to continue in runs/compare" in capsys.readouterr().err


def test_a_command_prints_its_record_with_json_and_else_lines_and_tables_with_brackets_as_they_are(boom):
    def given(rank: int = Option(8)):
        return rank

    def command(settings=Group(given)):
        yield {"rank": settings}
        yield "Layers [fp32]", ["name", "rank"], [["model.layers[0]", settings]]
        yield "Drift", pd.DataFrame({"method": ["LoRA [r=4]"], "KL": [0.123456], "seconds": [None]})
        yield "Wide", [f"column {i}" for i in range(9)], [[f"a cell with words {i} " * 3 for i in range(9)]]
        yield "done"

    status, out, _ = boom(as_command(command), "boom", "--rank", "7", "--json")
    assert (status, json.loads(out)) == (0, {"rank": 7})
    status, out, _ = boom(as_command(command))
    assert status == 0
    shown = ["Layers [fp32]", "model.layers[0]", " 8 ", "Drift", "LoRA [r=4]", "0.123", "–", "done"]
    shown += [f"a cell with words {i} " * 3 for i in range(9)]
    assert [text for text in shown if text not in out] == []
