"""The `hiplora` command: one module of this package per command, each light until its command runs."""

import importlib
import io
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence

import typer

from hiplora import __version__
from hiplora.cli.common import as_command
from hiplora.cli.study import app as study_app
from hiplora.errors import HipLoraError, first_line
from hiplora.extras import missing

ISSUES = "https://github.com/hiplora/hiplora/issues"

# In the order of the help page. `hiplora.cli.<name>` holds `command`, a plain Typer function.
COMMANDS = {
    "demo": "See on a small model what LoRA and HiP-LoRA do to it.",
    "compare": "See what they do to your model on your data.",
    "tune": "Find settings that learn most within a limit of drift.",
    "init": "Write a training recipe to edit.",
    "train": "Fine-tune an adapter on your data.",
    "eval": "Score a model and its adapters on tasks or on your rows.",
    "drift": "Measure how far adapters move a model on other text.",
    "generate": "Answer prompts with and without adapters, side by side.",
    "chat": "Talk to a model and to its adapters at once.",
    "export": "Write an adapter as a plain LoRA, or as a model.",
    "protect": "Remove the directions that change the base most.",
    "merge": "Merge adapters of one base model.",
    "merge-check": "Measure what a merge breaks.",
    "inspect": "Show what an adapter touches in its base model.",
    "edit": "Rewrite facts, and measure the rest.",
    "probe": "Change single directions of weights, and measure.",
    "calibrate": "Measure a model's layers ahead of training.",
    "factorize": "Factor a model's weights ahead of training.",
}
# What safetensors and torch report of a full disk, in errors of their own types.
_DISK_FULL = ("Error while serializing: I/O error", "PytorchStreamWriter failed", "unexpected pos")
_HOMES = {"chat": "generate", "init": "train"}  # commands that are in another's module, under their own names

# Without rich's markup the help page takes a third of the time.
app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 100},
    help="Fine-tune without breaking what the model already knows.",
    epilog="Start with: hiplora demo. Exit status: 0 success, 1 failure, 2 wrong usage or input, 130 interrupted.",
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"hiplora {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    # Taken out of the arguments by `main`, so that it works before and after a command; here for the help page.
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Show the version."),
) -> None:
    pass


for _name, _short in COMMANDS.items():
    _home = importlib.import_module("hiplora.cli." + _HOMES.get(_name, _name.replace("-", "_")))
    app.command(name=_name, short_help=_short)(as_command(getattr(_home, _name, _home.command)))
app.add_typer(study_app, name="study", short_help="Plan, run and report a study: every table of the paper.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit status: 0 success, 1 failure, 2 usage or input, 130 Ctrl-C.

    A failure is one line on standard error; `--debug` (or HIPLORA_DEBUG=1) adds its traceback.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Ended in order, so that nothing half-written stays behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    for stream in (sys.stdin, sys.stdout):  # a terminal or file of Latin-1, or of Windows, lacks σ and …
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    debug = "--debug" in words or os.environ.get("HIPLORA_DEBUG", "0") not in ("", "0")
    formatwarning = warnings.formatwarning
    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore", FutureWarning)  # the libraries' notes to each other
            warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # type: ignore[assignment]
        try:
            app(args=[word for word in words if word != "--debug"])
        except Exception as error:  # the last net: no user sees a traceback unasked
            if debug:
                traceback.print_exc()
            typer.echo(f"error: {_explained(error)}", err=True)
            raise SystemExit(getattr(error, "exit_code", 1)) from None
        finally:
            warnings.formatwarning = formatwarning


def _explained(error: Exception) -> str:
    """Return the message of a failure; an unexpected one is called a bug."""
    if isinstance(error, ModuleNotFoundError) and not (error.name or "hiplora").startswith("hiplora"):
        return str(missing(str(error.name)))
    if isinstance(error, (HipLoraError, OSError)):  # OSError: a full disk, an unwritable folder
        return str(error) or type(error).__name__
    if isinstance(error, IndexError) and "index out of range in self" in str(error):
        return (
            "the model has no embedding for some token or position of a text; use the tokenizer that belongs to it, "
            "and shorter texts"
        )
    if any(part in str(error) for part in _DISK_FULL):
        return f"cannot write a file of tensors ({first_line(error)}); free some space, or write to another folder"
    return (
        f"unexpected {type(error).__name__} ({first_line(error)}); this is a bug in hiplora: repeat the command with "
        f"--debug and report what it shows at {ISSUES}"
    )


if __name__ == "__main__":
    main()
