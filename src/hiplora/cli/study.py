"""`hiplora study`: plan, run, watch and report a whole study."""

import contextlib
import os
import sys
import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hiplora.cli.common import JSON_OPTION, emit_json, print_table
from hiplora.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hiplora.study.running import Opened, Progress

    OnProgress = Callable[[Progress, dict[str, Any]], None]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Plan, run and report a whole study: every table of the paper from one recipe, resumable.",
)

RECIPE = typer.Argument(
    ..., help="Recipe of the study: a YAML file, or pico, smol, frontier, paper and the like."
)
OUT = typer.Option(None, "--out", help="Folder of the study, where it goes on; studies/NAME, if not given.")
DATA = typer.Option(
    None,
    "--data",
    help="Folder with the study's files; else $HIPLORA_DATA. What it lacks comes from the hub, if the recipe says so.",
)
SET = typer.Option([], "--set", help="Override a field of the recipe, as train.steps=20; may be repeated.")
CODE = typer.Option(False, "--allow-code-execution", help="Let code that the model writes run, in a sandbox.")
REUSE = typer.Option(
    [], "--reuse", help="Records of the same study from elsewhere (records.jsonl.gz); repeatable."
)


class ExecutorName(str, Enum):
    """Where jobs run."""

    local = "local"
    ray = "ray"


@app.command()
def plan(
    recipe: str = RECIPE,
    out: Path | None = OUT,
    data: Path | None = DATA,
    changes: list[str] = SET,
    gpu: str = typer.Option(
        "h100", "--gpu", help="A GPU to estimate for beside this machine (docs/study.md lists them)."
    ),
    measure: bool = typer.Option(
        True, "--measure/--no-measure", help="Time this machine for a few seconds, once."
    ),
    as_json: bool = JSON_OPTION,
) -> None:
    """Show what a study has to do and what it will cost; no weights are loaded.

    Example:

        hiplora study plan paper --gpu h100
    """
    from hiplora.study.estimate import gpu as named_gpu
    from hiplora.study.estimate import measure_machine
    from hiplora.study.plan import plan as plan_study
    from hiplora.study.running import check_tasks

    opened = _open(recipe, out, data, changes, False)
    check_tasks(opened.graph)
    machines = {"this machine": measure_machine(opened.study.recipe.model)} if measure else {}
    machines[named_gpu(gpu).name] = named_gpu(gpu)
    found = plan_study(opened.study, opened.graph, machines, opened.store)
    emit_json(found) if as_json else _print_plan(found)


@app.command()
def run(
    recipe: str = RECIPE,
    out: Path | None = OUT,
    data: Path | None = DATA,
    changes: list[str] = SET,
    workers: int | None = typer.Option(
        None, "--workers", min=1, help="Processes that do jobs at the same time; 1, if not given."
    ),
    executor: ExecutorName = typer.Option(
        ExecutorName.local, "--executor", help="Where: processes of this machine, or Ray."
    ),
    address: str | None = typer.Option(
        None, "--address", help="Of a running Ray cluster; without it one is started here."
    ),
    gpus_per_job: float = typer.Option(0.0, "--gpus-per-job", min=0, help="GPUs that each job asks Ray for."),
    reuse: list[Path] = REUSE,
    allow_code: bool = CODE,
    verbose: bool = typer.Option(False, "--verbose", help="A line on standard error for every job."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Do everything of a study that is missing. It may be interrupted at any moment: the same command goes on.

    A job that fails does not stop the others; what failed and why is said at the end, and the exit status is 1.

    Example:

        hiplora study run smol --data benchmarks --workers 2 --allow-code-execution
    """
    from hiplora.study.running import Executor, status
    from hiplora.study.running import run as run_study

    if executor == ExecutorName.local and (address is not None or gpus_per_job):
        given = "--address" if address is not None else "--gpus-per-job"
        raise ConfigError(f"{given}: is for a Ray cluster; add --executor ray, or leave it out")
    if address is not None and workers is not None:
        raise ConfigError("--workers: a running cluster has its own; leave out --workers, or --address")
    opened = _open(recipe, out, data, changes, allow_code)
    taken = sum(opened.store.take(path) for path in reuse)
    with _told(verbose) as tell:
        left = run_study(opened, Executor(executor.value, workers or 1, address, gpus_per_job), tell)
    found = {**status(opened), "taken": taken, "blocked": len(left.blocked)}
    if as_json:
        emit_json(found)
    else:
        _print_failures(found)
        done = found["jobs"] - found["left"]
        typer.echo(f"{done:,} of {found['jobs']:,} jobs are done: {opened.store.path}")
    if left.failed:
        raise SystemExit(1)


@app.command()
def status(
    recipe: str = RECIPE,
    out: Path | None = OUT,
    data: Path | None = DATA,
    changes: list[str] = SET,
    as_json: bool = JSON_OPTION,
) -> None:
    """Show how far a study is, what is at work, what failed and why.

    Example:

        hiplora study status smol --data benchmarks
    """
    from hiplora.study.running import status as status_of

    found = status_of(_open(recipe, out, data, changes, False))
    if as_json:
        emit_json(found)
        return
    rows = [(kind, n["jobs"], n["jobs"] - n["left"], n["left"]) for kind, n in found["kinds"].items()]
    rows.append(("all", found["jobs"], found["jobs"] - found["left"], found["left"]))
    print_table(f"{found['study']}: jobs", ("Kind", "jobs", "done", "left"), rows)
    for name in found["at_work"]:
        typer.echo(f"at work: {name}")
    if found["left"] and found["core_seconds_left"] is not None:
        typer.echo(f"about {_duration(found['core_seconds_left'])} are left for one worker")
    _print_failures(found)


@app.command()
def report(
    recipe: str = RECIPE,
    out: Path | None = OUT,
    data: Path | None = DATA,
    changes: list[str] = SET,
    to: Path | None = typer.Option(
        None, "--to", help="Folder of the report; `report` in the study's folder, if not given."
    ),
    reuse: list[Path] = REUSE,
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace --to if it exists."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Write tables (CSV, JSON, Markdown, LaTeX), figures (SVG, PDF) and one page of what a study found so far.

    Example:

        hiplora study report smol --data benchmarks --to docs/results/smol --overwrite
    """
    from hiplora.study.report import report as write

    opened = _open(recipe, out, data, changes, False)
    for path in reuse:
        opened.store.take(path)
    found = write(opened, to or opened.store.path / "report", overwrite or to is None)
    if as_json:
        emit_json(found)
        return
    for name, missing in found["sections"].items():
        if missing:
            typer.echo(f"{name}: waits for {missing:,} jobs")
    typer.echo(f"{found['measurements']:,} measurements: {found['page']}")


def _open(recipe: str, out: Path | None, data: Path | None, changes: list[str], allow_code: bool) -> "Opened":
    from hiplora.recipes.load_study import load_study
    from hiplora.study.running import open_study

    loaded = load_study(recipe, changes)
    folder = out or Path("studies") / loaded.study
    return open_study(loaded, folder, data or os.environ.get("HIPLORA_DATA"), allow_code)


@contextlib.contextmanager
def _told(verbose: bool) -> "Iterator[OnProgress]":
    """Tell how a run goes: a bar with the time left where standard error is a terminal, lines if asked for."""
    if verbose or not sys.stderr.isatty():
        yield _lines() if verbose else lambda progress, event: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bars

    told = TextColumn("{task.fields[left]}")
    console = Console(file=sys.stderr)
    with Bars(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), told, console=console
    ) as bars:
        task = bars.add_task("study", total=None, left="")

        def tell(progress: "Progress", event: dict[str, Any]) -> None:
            name = progress.opened.graph[event["key"]].name
            over = progress.done + progress.failed
            bars.update(
                task, total=progress.total, completed=over, left=_left(progress), description=name[:60]
            )

        yield tell


def _lines() -> "OnProgress":
    began = time.monotonic()

    def tell(progress: "Progress", event: dict[str, Any]) -> None:
        if event["event"] == "begin":
            return
        count = f"{progress.done + progress.failed}/{progress.total}"
        word = "FAILED " if event["event"] == "failed" else ""
        name = progress.opened.graph[event["key"]].name
        passed = _duration(time.monotonic() - began)
        typer.echo(f"{passed}  {count}  {word}{name}  {_left(progress)}".rstrip(), err=True)

    return tell


def _left(progress: "Progress") -> str:
    seconds = progress.seconds_left()
    return "" if seconds is None else f"about {_duration(seconds)} left"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.1f} h"


def _print_failures(found: dict[str, Any]) -> None:
    for name, error in found["failed"].items():
        typer.echo(f"failed: {name}: {error}", err=True)
    for why in found["diverged"].values():
        typer.echo(f"diverged: {why}", err=True)


def _print_plan(found: dict[str, Any]) -> None:
    rows = [(m["title"], f"{m['trainable']:,}", f"{m['mismatch']:+.1f} %") for m in found["methods"].values()]
    print_table(
        f"{found['study']} on {found['model']}: methods",
        ("Method", "trainable parameters", "against the first"),
        rows,
    )
    for name, machine in found["machines"].items():
        lines = [(kind, *_costs(sums)) for kind, sums in machine["kinds"].items()]
        lines.append(("all", *_costs(machine["total"])))
        columns = ("Jobs", "number", "tokens", "FLOPs", "memory", "disk", "time")
        print_table(f"{name}: {found['left']:,} of {found['jobs']:,} jobs are left", columns, lines)
        fits = (
            ""
            if machine["fits"]
            else f"; the largest job does NOT fit into its {_size(machine['memory_available'])}"
        )
        devices = f" on {machine['devices']} devices" if machine["devices"] > 1 else ""
        typer.echo(f"about {_duration(3600 * machine['hours'])}{devices}{fits}. {machine['basis']}")
    rows = [
        (
            task,
            "all" if p["items"] is None else p["items"],
            "" if p["smallest_difference"] is None else f"{p['smallest_difference']:.1f} pp",
        )
        for task, p in found["power"].items()
    ]
    print_table(
        "What the items can tell, if an item's difference between two methods spreads by 25 pp",
        ("Task", "items", "smallest difference"),
        rows,
    )
    if found["merges"] is not None:
        count, unseen = found["merges"]["different"], found["merges"]["may_fail_unseen"]
        typer.echo(
            f"MergeFail: {count:,} different merges; if none of them fails, up to {unseen:.1f} % still may."
        )
    if found["missing"]:
        typer.echo(f"files that are not in the data folder: {', '.join(found['missing'])}")
    if found["assumed"]:
        typer.echo(
            f"neither here nor known, so that what they take is assumed: {', '.join(found['assumed'])}"
        )


def _costs(sums: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{sums['jobs']:,}",
        f"{sums['tokens'] / 1e6:,.2f} M",
        f"{sums['flops']:.1e}",
        _size(sums["memory_bytes"]),
        _size(sums["disk_bytes"]),
        _duration(sums["seconds"]),
    )


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
