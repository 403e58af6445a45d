"""`hiplora study`: plan, run, watch and report a whole study."""

import os
import sys
from pathlib import Path
from typing import Any, Literal

import typer

from hiplora.cli.common import JSON_OPTION, emit_json, print_table
from hiplora.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Plan, run and report a whole study: every table of the paper from one recipe, resumable.",
)

RECIPE = typer.Argument(..., help="Recipe of the study: a YAML file, or pico, smol, frontier, paper, …")
OUT = typer.Option(None, "--out", help="Folder of the study, new or to be continued; default studies/NAME.")
DATA = typer.Option(
    None,
    "--data",
    help="Folder with the study's files, default $HIPLORA_DATA. Missing files come from the hub where the recipe "
    "names a data set.",
)
SET = typer.Option([], "--set", help="Override a field of the recipe, for example train.steps=20; repeatable.")
CODE = typer.Option(False, "--allow-code-execution", help="Run code that the model writes, in a sandbox.")
REUSE = typer.Option([], "--reuse", help="Records of the same study from elsewhere (records.jsonl.gz); repeatable.")


@app.command()
def plan(
    recipe: str = RECIPE,
    out: Path | None = OUT,
    data: Path | None = DATA,
    changes: list[str] = SET,
    measure: bool = typer.Option(
        False, "--measure", help="Time one training step and one evaluation batch on this machine."
    ),
    as_json: bool = JSON_OPTION,
) -> None:
    """Show a study's jobs by kind, and the time and memory that those left will take.

    Times come from the jobs done so far and, with --measure, from a short measurement.

    Example:

        hiplora study plan smol --data benchmarks --measure
    """
    from hiplora.study import plan as planning

    opened = _open(recipe, out, data, changes)
    planning.check_tasks(opened.graph)
    _show(planning.status(opened, planning.measure(opened) if measure else None), as_json)


@app.command()
def run(
    recipe: str = RECIPE,
    out: Path | None = OUT,
    data: Path | None = DATA,
    changes: list[str] = SET,
    workers: int = typer.Option(1, "--workers", min=1, help="Jobs to run at a time; not for --address."),
    executor: Literal["local", "ray"] = typer.Option("local", "--executor", help="Processes of this machine, or Ray."),
    address: str | None = typer.Option(
        None, "--address", help="A running Ray cluster; by default one is started here."
    ),
    gpus_per_job: float = typer.Option(0.0, "--gpus-per-job", min=0, help="GPUs that each job asks Ray for."),
    reuse: list[Path] = REUSE,
    allow_code: bool = CODE,
    verbose: bool = typer.Option(False, "--verbose", help="Print a line to standard error for every job."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Run all jobs of a study that are not done. Interrupt it at any time; the same command continues.

    A failed job does not stop the others: it is reported at the end, and the exit status is 1.

    Example:

        hiplora study run smol --data benchmarks --workers 2 --allow-code-execution
    """
    from hiplora.study.plan import check, status

    if executor == "local" and (address is not None or gpus_per_job):
        given = "--address" if address is not None else "--gpus-per-job"
        raise ConfigError(f"{given}: is for a Ray cluster; add --executor ray, or remove it")
    opened = _open(recipe, out, data, changes, allow_code)
    check(opened)
    taken = sum(opened.store.take(path) for path in reuse)
    cluster = {"executor": executor, "address": address, "gpus_per_job": gpus_per_job}
    failed = _run(opened, verbose, workers=workers, **cluster)
    found = {**status(opened), "taken": taken}
    if as_json:
        emit_json(found)
    else:
        _print_failures(found)
        done = found["jobs"] - found["left"]
        typer.echo(f"{done:,} of {found['jobs']:,} jobs are done: {opened.store.path}")
    if failed:
        raise SystemExit(1)


@app.command()
def status(
    recipe: str = RECIPE,
    out: Path | None = OUT,
    data: Path | None = DATA,
    changes: list[str] = SET,
    as_json: bool = JSON_OPTION,
) -> None:
    """Show how far a study is, what is running, and what failed and why.

    Example:

        hiplora study status smol --data benchmarks
    """
    from hiplora.study.plan import status as status_of

    _show(status_of(_open(recipe, out, data, changes)), as_json)


@app.command()
def report(
    recipe: str = RECIPE,
    out: Path | None = OUT,
    data: Path | None = DATA,
    changes: list[str] = SET,
    to: Path | None = typer.Option(None, "--to", help="Folder of the report; default `report` in the study's folder."),
    reuse: list[Path] = REUSE,
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace --to if it exists."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Write tables, figures, measurements and one page of what a study found so far.

    Example:

        hiplora study report smol --data benchmarks --to docs/results/smol --overwrite
    """
    from hiplora.study.report import report as write

    opened = _open(recipe, out, data, changes)
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


def _open(recipe: str, out: Path | None, data: Path | None, changes: list[str], allow_code: bool = False) -> Any:
    from hiplora.study.plan import open_study
    from hiplora.study.recipe import load_study

    loaded = load_study(recipe, changes)
    folder = out or Path("studies") / loaded.study
    return open_study(loaded, folder, data or os.environ.get("HIPLORA_DATA"), allow_code)


def _run(opened: Any, verbose: bool, **options: Any) -> set[Any]:
    """Run the jobs behind a bar on a terminal; with `verbose` a line for each. Return those that failed."""
    from tqdm import tqdm

    from hiplora.study.execute import run_graph

    total, done = len(opened.store.unfinished(opened.graph)), 0
    with tqdm(total=total, unit="job", file=sys.stderr, disable=None, leave=False) as bar:

        def on_event(event: str, job: Any) -> None:
            nonlocal done
            bar.set_postfix_str(job.name[:60])
            if event == "begin":
                return
            done += 1
            bar.update()
            if verbose:
                tqdm.write(f"{done}/{total}  {'FAILED ' * (event == 'failed')}{job.name}", file=sys.stderr)

        return run_graph(opened.graph, opened.place, on_event=on_event, **options)


def _show(found: dict[str, Any], as_json: bool) -> None:
    """Print how far a study is."""
    if as_json:
        emit_json(found)
        return
    every = {"jobs": found["jobs"], "left": found["left"], "seconds": found["seconds_left"]}
    rows = [
        (kind, n["jobs"], n["jobs"] - n["left"], n["left"], _duration(n["seconds"]))
        for kind, n in {**found["kinds"], "all": every}.items()
    ]
    print_table(f"{found['study']}: jobs", ("Kind", "jobs", "done", "left", "time of one worker"), rows)
    if found["left"] and found["without_estimate"]:
        typer.echo(f"no estimate yet, and left out of the sum: {', '.join(found['without_estimate'])}")
    if found["peak_memory_bytes"] is not None:
        typer.echo(f"peak memory of a training: {found['peak_memory_bytes'] / 2**30:.1f} GiB")
    if found["missing_files"]:
        typer.echo(f"missing from the data folder: {', '.join(found['missing_files'])}")
    for name in found["at_work"]:
        typer.echo(f"running: {name}")
    _print_failures(found)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _print_failures(found: dict[str, Any]) -> None:
    for name, error in found["failed"].items():
        typer.echo(f"failed: {name}: {error}", err=True)
    for reason in found["diverged"].values():
        typer.echo(f"diverged: {reason}", err=True)
