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
TRAINING = ("train", "compare", "tune")  # commands that all processes of a launcher run
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
    lines, and tables as (title, DataFrame) or (title, columns, rows). Under a launcher the first process alone runs a
    command that does not train, and prints.
    """
    signature, prints = inspect.signature(function).parameters, inspect.isgeneratorfunction(function)
    groups = {name: parameter.default for name, parameter in signature.items() if isinstance(parameter.default, Group)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.items():
        parameters += groups[name].parameters.values() if name in groups else [parameter]
    if prints:
        option = Option(False, "--json", help="Print one JSON object instead of a table.")
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter("as_json", kind, default=option, annotation=bool))

    @functools.wraps(function)
    def command(*, as_json: bool = False, **arguments: Any) -> None:
        is_first = int(os.environ.get("RANK", "0")) == 0
        if function.__module__.rpartition(".")[2] not in TRAINING:
            if not is_first:
                return
            for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # nothing may wait for the others
                os.environ.pop(variable, None)
        read = inputs(arguments)
        for name, group in groups.items():
            arguments[name] = group.make(**{option: arguments.pop(option) for option in group.parameters})
        with sparing(read):
            output = function(**arguments)
            for index, part in enumerate(output if prints else ()):
                if not is_first:
                    break
                if as_json and index == 0:
                    typer.echo(json.dumps(part, indent=2, default=str))
                elif not as_json and index > 0:
                    print_table(*part) if isinstance(part, tuple) else typer.echo(part)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def inputs(arguments: Mapping[str, Any]) -> dict[str, Path]:
    """Return the paths that a command reads, and those that these name: an adapter's base model, a YAML's files."""
    read: dict[str, Path] = {}
    for name in arguments.keys() & INPUTS:
        for value in map(str, arguments[name] if isinstance(arguments[name], list) else [arguments[name]]):
            path = next((path for path in _existing_paths(value) if name not in FILES or path.is_file()), None)
            if path is not None:
                read[f"an input, {path}"] = path
                with contextlib.suppress(OSError, ValueError, RecursionError):  # a file that is broken
                    read |= {f"what {path} names, {named}": named for named in _paths_named_in(path)}
    return read


def _existing_paths(value: str) -> list[Path]:
    """Return the files and folders that a value of an option may mean: a known model's, its own, NAME=FOLDER's."""
    from hiplora.models import KNOWN, model_dir

    paths = [model_dir(value)] if value in KNOWN else [Path(value), Path(value.partition("=")[2] or value)]
    with contextlib.suppress(OSError, ValueError):  # a text that no file can be named
        return [path for path in paths if path.name and path.exists()]
    return []


def _paths_named_in(path: Path) -> list[Path]:
    """Return the base model that an adapter folder names, or the files that a YAML file names."""
    config = path / "adapter_config.json"
    if config.is_file():
        fields = json.loads(config.read_text(encoding="utf-8"))
        base = fields.get("base_model_name_or_path") if isinstance(fields, dict) else None
        return [Path(base)] if isinstance(base, str) else []
    pending = [parse_yaml(path.read_text(encoding="utf-8"))] if path.suffix in (".yaml", ".yml") else []
    texts: list[str] = []
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list):
            pending += value
        elif isinstance(value, str):
            texts.append(value)
    return [file for text in texts for file in _existing_paths(os.path.join(path.parent, text)) if file.is_file()]


def tell(text: str) -> None:
    """Print a line about the work to standard error."""
    typer.echo(text, err=True)


def next_step(*words: Any, why: str = "") -> str:
    """Return the last line that a command prints: the command that does what comes next, to copy."""
    from hiplora.models import KNOWN, model_dir

    names = {str(model_dir(name)): name for name in KNOWN}
    return f"next: {shlex.join(names.get(str(word), str(word)) for word in words)}" + (f"   ({why})" if why else "")


def try_step(out: Path, update: Any, dense: bool = False) -> str:
    """Return `next_step` after an update was written to `out`: run it, where it is of a model that writes text."""
    from hiplora.adapters import has_words

    if not (update.base and has_words(update)):
        return f"next: load {out} as its README.md says" if dense else next_step("hiplora", "inspect", out)
    model = [out] if dense else [update.base, "--adapter", out]
    return next_step("hiplora", "generate", *model, "--prompt", "Why is the sky blue?")


def train_step(model: str, **method: Any) -> str:
    """Return `next_step` after a model was measured for training, with the settings that find the measurements."""
    fields = {key: json.dumps(value, ensure_ascii=False) for key, value in method.items() if value}
    settings = [word for key, value in fields.items() for word in ("--set", f"method.{key}={value}")]
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
    """Return the numbers, separated by commas, of an option; ConfigError if one is not a number of the kind."""
    try:
        return [kind(part) for part in text.split(",")] if text else []
    except ValueError:
        expected = (
            "whole numbers separated by commas, for example 2,3" if kind is int else "numbers, for example 1,0.5"
        )
        raise ConfigError(f"{option} {text}: expected {expected}") from None


def targets(text: str | None) -> str | list[str] | None:
    """Return modules as a list of names; anything else is for PEFT: a regular expression or "all-linear"."""
    if text is None or text.lower() == "all-linear" or not re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", text):
        return text
    return names(text)


def checked(kind: Callable[..., Kind], **settings: Any) -> Kind:
    """Return settings that pydantic checks; ConfigError naming the option if one is wrong."""
    from pydantic import ValidationError

    try:
        return kind(**settings)
    except ValidationError as error:
        raise ConfigError(f"--{first_problem(error)}") from None
