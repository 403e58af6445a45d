"""What the commands share: options, groups of options, and how results are printed."""

import contextlib
import functools
import inspect
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from typer import Option

from hiplora.errors import ConfigError, first_problem
from hiplora.files import parse_yaml, sparing

if TYPE_CHECKING:
    import pandas as pd

# Parameters that name what a command reads; of some only files: a folder of data may hold outputs.
FILES = {"data", "recipe"}
INPUTS = FILES | {"adapter", "adapters", "base", "drift_text", "edits", "model", "prompts", "suite", "text"}
Kind = TypeVar("Kind")
Shown = Iterator[Any]
WIDE = 1000  # columns of a file or a pipe, where no table needs to be folded

MODEL = typer.Argument(..., help="Base model: a folder, a hub name, smollm2-135m or gemma3-270m.")
ADAPTER = typer.Argument(..., help="Adapter folder, of any PEFT method that changes linear layers.")
ADAPTERS = Option([], "--adapter", help="Adapter folder, or NAME=FOLDER; may be repeated.")
BASE = Option(None, help="Base model, instead of the adapter's own.")
OUT = Option(..., help="Output folder; it must not exist yet.")
OVERWRITE = Option(False, "--overwrite", help="Replace the output if it exists.")
PUSH = Option(None, "--push-to-hub", help="Upload the result to this hub repository (owner/name), private if new.")
DEVICE = Option("auto", help="auto (a GPU if there is one), cpu, cuda, …")
DRIFT_TEXT = Option(None, help="Text file to measure drift on; else prose and code of Python's own.")
CALIBRATION_TEXT = Option(
    None,
    help="What the layers' inputs are measured on: a text file, training data, or a data set on the hub (owner/name or "
    "owner/name:config); else text that the model writes itself.",
)
TARGETS_HELP = "Module names separated by commas, a regular expression, or all-linear; else the {} projections."
MLP_TARGETS = Option(None, help=TARGETS_HELP.format("MLP"))
ATTENTION_TARGETS = Option(None, help=TARGETS_HELP.format("attention"))


class Group:
    """A parameter of a command whose value a function makes of options of its own."""

    def __init__(self, make: Callable[..., Any]):
        self.make, self.parameters = make, inspect.signature(make).parameters


def scaling(
    scale: float | None = Option(None, help="Multiply the update by this number, for example 0.75."),
    tolerance: float | None = Option(
        None, help="Search the smallest scale that raises the loss on --data by so many nats at most."
    ),
    data: Path | None = Option(None, help="Rows of the task that were not trained on, to measure loss on."),
) -> dict[str, Any]:
    """How large an update is written: arguments of `choose_scale` and `protect_adapter`."""
    return {"scale": scale, "tolerance": tolerance, "data": data}


def as_command(function: Callable[..., Any]) -> Callable[..., None]:
    """Make a Typer command of a function: its `Group`s unfolded, and what it yields printed.

    A command that prints results yields them: first the record that `--json` prints, then what is shown without it:
    lines, and tables as (title, DataFrame) or (title, columns, rows).
    """
    own, printing = inspect.signature(function).parameters, inspect.isgeneratorfunction(function)
    groups = {name: one.default for name, one in own.items() if isinstance(one.default, Group)}
    parameters: list[inspect.Parameter] = []
    for name, one in own.items():
        parameters += groups[name].parameters.values() if name in groups else [one]
    if printing:
        option = Option(False, "--json", help="Print one JSON object instead of a table.")
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter("as_json", kind, default=option, annotation=bool))

    @functools.wraps(function)
    def command(*, as_json: bool = False, **given: Any) -> None:
        read = inputs(given)
        for name, group in groups.items():
            given[name] = group.make(**{part: given.pop(part) for part in group.parameters})
        with sparing(read):
            found = function(**given)
            for place, part in enumerate(found if printing else ()):
                if as_json and place == 0:
                    typer.echo(json.dumps(part, indent=2, default=str))
                elif not as_json and place > 0:
                    print_table(*part) if isinstance(part, tuple) else typer.echo(part)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command


def inputs(given: Mapping[str, Any]) -> dict[str, Path]:
    """Return what a command was given to read, and what that names: an adapter's base model, the files of a YAML."""
    found: dict[str, Path] = {}
    for name in given.keys() & INPUTS:
        for value in map(str, given[name] if isinstance(given[name], list) else [given[name]]):
            path = next((place for place in _places(value) if name not in FILES or place.is_file()), None)
            if path is not None:
                found[f"an input, {path}"] = path
                with contextlib.suppress(OSError, ValueError, RecursionError):  # a file that is broken
                    found |= {f"what {path} names, {part}": part for part in _named_in(path)}
    return found


def _places(value: str) -> list[Path]:
    """Return the files and folders that a value of an option may mean: a known model's, its own, NAME=FOLDER's."""
    from hiplora.models import KNOWN, model_dir

    places = [model_dir(value)] if value in KNOWN else [Path(value), Path(value.partition("=")[2] or value)]
    with contextlib.suppress(OSError, ValueError):  # a text that no file can be named
        return [place for place in places if place.name and place.exists()]
    return []


def _named_in(path: Path) -> list[Path]:
    """Return the base model that an adapter folder names, or the files that a YAML file names."""
    config = path / "adapter_config.json"
    if config.is_file():
        given = json.loads(config.read_text(encoding="utf-8"))
        base = given.get("base_model_name_or_path") if isinstance(given, dict) else None
        return [Path(base)] if isinstance(base, str) else []
    left = [parse_yaml(path.read_text(encoding="utf-8"))] if path.suffix in (".yaml", ".yml") else []
    texts: list[str] = []
    while left:
        value = left.pop()
        left += value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
        texts += [value] if isinstance(value, str) else []
    return [file for text in texts for file in _places(os.path.join(path.parent, text)) if file.is_file()]


def tell(text: str) -> None:
    """Print a line about the work to standard error."""
    typer.echo(text, err=True)


def next_step(*words: Any, why: str = "") -> str:
    """Return the last line that a command prints: the command that does what comes next, to copy."""
    from hiplora.models import KNOWN, model_dir

    known = {str(model_dir(name)): name for name in KNOWN}
    return f"next: {shlex.join(known.get(str(word), str(word)) for word in words)}" + (f"   ({why})" if why else "")


def try_step(out: Path, update: Any, dense: bool = False) -> str:
    """Return `next_step` after an update was written to `out`: run it, where it is of a model that writes text."""
    from hiplora.adapters import has_words

    if not (update.base and has_words(update)):
        return f"next: load {out} as its README.md says" if dense else next_step("hiplora", "inspect", out)
    model = [out] if dense else [update.base, "--adapter", out]
    return next_step("hiplora", "generate", *model, "--prompt", "Why is the sky blue?")


def train_step(model: str, **method: Any) -> str:
    """Return `next_step` after a model was measured for training, with the settings that find the measurements."""
    given = {key: json.dumps(value, ensure_ascii=False) for key, value in method.items() if value}
    settings = [word for key, value in given.items() for word in ("--set", f"method.{key}={value}")]
    return next_step("hiplora", "train", "--model", model, "--data", "rows.jsonl", *settings, "--out", "runs/first")


@contextlib.contextmanager
def told_to_repeat(out: Path | str) -> Iterator[None]:
    """Say at Ctrl-C that the same command continues in `out`."""
    try:
        yield
    except KeyboardInterrupt as stop:
        tell(f"{str(stop) or 'stopped'}; repeat the command (without --overwrite) to continue in {out}")
        raise


def print_table(
    title: str, table: "pd.DataFrame | Sequence[str]", rows: Iterable[Sequence[Any]] | None = None
) -> None:
    """Print a table to standard output, brackets taken literally; columns after the first are right-aligned.

    It is a DataFrame, formatted as in the reports, or names of columns with rows of text.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if rows is None:
        from hiplora.reporting import formatted

        df = formatted(table)
        table, rows = list(df.columns), df.to_numpy().tolist()
    cells = [[Text(str(cell)) for cell in row] for row in rows]
    printed = Table(title=Text(title), title_justify="left")
    first, *others = map(Text, table)
    # Names stay whole where the numbers' headings can wrap instead.
    printed.add_column(first, min_width=min(24, max((len(row[0]) for row in cells), default=0)), overflow="fold")
    for column in others:
        printed.add_column(column, justify="right", overflow="fold")
    for row in cells:
        printed.add_row(*row)
    Console(width=None if sys.stdout.isatty() else WIDE).print(printed)


def names(text: str) -> list[str]:
    """Return names that are separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def numbers(option: str, text: str | None, kind: Callable[[str], Kind]) -> list[Kind]:
    """Return the numbers, separated by commas, of an option; ConfigError if one is no number of the kind."""
    try:
        return [kind(part) for part in text.split(",")] if text else []
    except ValueError:
        expected = (
            "whole numbers separated by commas, for example 2,3" if kind is int else "numbers, for example 1,0.5"
        )
        raise ConfigError(f"{option} {text}: expected {expected}") from None


def targets(given: str | None) -> str | list[str] | None:
    """Return modules as a list of names; anything else is for PEFT: a regular expression or "all-linear"."""
    if given is None or given.lower() == "all-linear" or not re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", given):
        return given
    return names(given)


def checked(kind: Callable[..., Kind], **given: Any) -> Kind:
    """Return settings that pydantic checks; ConfigError naming the option if one is wrong."""
    from pydantic import ValidationError

    try:
        return kind(**given)
    except ValidationError as error:
        raise ConfigError(f"--{first_problem(error)}") from None
