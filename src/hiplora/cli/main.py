"""The `hiplora` command: one module of this package per command, each light until its command runs."""

import importlib
import importlib.util
import os
import traceback

import typer

from hiplora import __version__
from hiplora.errors import HipLoraError

# In the order of the help page. `hiplora.cli.<name>` holds `command`, a plain Typer function.
COMMANDS = ("demo", "compare", "factorize", "train", "export", "inspect")

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
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Show the version."),
) -> None:
    if debug:
        os.environ["HIPLORA_DEBUG"] = "1"


for _name in COMMANDS:
    if importlib.util.find_spec(f"hiplora.cli.{_name}") is None:  # TEMPORARY while commands are being written
        continue
    app.command(name=_name)(importlib.import_module(f"hiplora.cli.{_name}").command)


def main() -> None:
    """Run the command line; exit with 0, 1 (failure), 2 (usage) or 130 (Ctrl-C); no traceback for a user's mistake."""
    try:
        app()
    except HipLoraError as error:
        _stop(error, error.exit_code)
    except OSError as error:  # a full disk, a folder that cannot be written: the message says it all
        _stop(error, 1)
    except KeyboardInterrupt as error:
        _stop(error, 130)


def _stop(error: BaseException, code: int) -> None:
    if os.environ.get("HIPLORA_DEBUG"):
        traceback.print_exc()
    typer.echo(f"error: {error}" if str(error) else f"stopped: {type(error).__name__}", err=True)
    raise SystemExit(code) from None


if __name__ == "__main__":
    main()
