"""The `hiplora` command: one module of this package per command, each light until its command runs."""

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

import typer

from hiplora import __version__
from hiplora.cli.study import app as study_app
from hiplora.errors import HipLoraError
from hiplora.extras import missing

# In the order of the help page. `hiplora.cli.<name>` holds `command`, a plain Typer function.
COMMANDS = (
    *("demo", "compare", "factorize", "calibrate", "train", "edit", "eval"),
    *("export", "protect", "merge", "merge-check", "inspect", "probe"),
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Fine-tune without breaking what the model already knows.",
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


for _name in COMMANDS:
    _home = importlib.import_module("hiplora.cli." + _name.replace("-", "_"))
    app.command(name=_name)(_home.command)
app.add_typer(study_app, name="study")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit status: 0 success, 1 failure, 2 usage or input, 130 Ctrl-C.

    A failure that hiplora or the system explains is one line on standard error; `--debug` (or HIPLORA_DEBUG=1) adds
    its traceback.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given or os.environ.get("HIPLORA_DEBUG", "0") not in ("", "0")
    try:
        app(args=[argument for argument in given if argument != "--debug"])
    except (
        HipLoraError,
        OSError,
        ModuleNotFoundError,
    ) as error:  # OSError: a full disk, an unwritable folder
        if isinstance(error, ModuleNotFoundError) and (error.name or "hiplora").startswith("hiplora"):
            raise
        if debug:
            traceback.print_exc()
        if isinstance(error, ModuleNotFoundError):
            error = missing(str(error.name))
        typer.echo(f"error: {str(error) or type(error).__name__}", err=True)
        raise SystemExit(getattr(error, "exit_code", 1)) from None


if __name__ == "__main__":
    main()
