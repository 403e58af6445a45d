"""`hiplora study`: plan, run, watch and report a whole study."""

import functools
import itertools
import sys
from pathlib import Path
from typing import Any, Literal

import typer
from typer import Argument, Option

from hiplora.cli.common import Group, Shown, as_command, tell
from hiplora.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Plan, run and report a whole study: every table of the paper from one recipe, resumable.",
)
DATA_HELP = (
    "Folder with the study's files, default $HIPLORA_DATA. Missing files come from the hub where the recipe names a "
    "data set."
)
ALLOW_CODE = Option(False, "--allow-code-execution", help="Run code that the model writes, in a sandbox.")
REUSE = Option([], help="Records of the same study from elsewhere (records.jsonl.gz); repeatable.")


def study(
    recipe: str = Argument(..., help="Recipe of the study: a YAML file, or pico, smol, frontier, paper, …"),
    out: Path | None = Option(None, help="Folder of the study, new or to be continued; default studies/NAME."),
    data: Path | None = Option(None, help=DATA_HELP),
    changes: list[str] = Option(
        [], "--set", help="Override a field of the recipe, for example train.steps=20; repeatable."
    ),
) -> Any:
    """A study, to be opened with or without leave to run code that a model writes."""
    from hiplora.study.plan import open_study
    from hiplora.study.recipe import load_study

    loaded = load_study(recipe, changes)
    folder = out or Path("studies") / loaded.study
    return functools.partial(open_study, loaded, folder, data)


STUDY = Group(study)


@app.command()
@as_command
def plan(
    study: Any = STUDY,
    measure: bool = Option(
        False, "--measure", help="Time one training step and one evaluation batch on this machine."
    ),
    allow_code: bool = ALLOW_CODE,
) -> Shown:
    """Show a study's jobs by kind, and the time and memory that those left will take.

    Times come from the jobs done so far and, with --measure, from a short measurement.

    Example:

        hiplora study plan smol --data benchmarks --measure
    """
    from hiplora.study import plan as planning

    opened = study(allow_code=allow_code)
    planning.check_tasks(opened)
    yield from _shown(planning.status(opened, planning.measure(opened) if measure else None))


@app.command()
@as_command
def run(
    study: Any = STUDY,
    workers: int = Option(1, min=1, help="Jobs to run at a time; not for --address."),
    executor: Literal["local", "ray"] = Option("local", help="Processes of this machine, or Ray."),
    address: str | None = Option(None, help="A running Ray cluster; by default one is started here."),
    gpus_per_job: float = Option(0.0, min=0, help="GPUs that each job asks Ray for."),
    reuse: list[Path] = REUSE,
    allow_code: bool = ALLOW_CODE,
    verbose: bool = Option(False, "--verbose", help="Print a line to standard error for every job."),
) -> Shown:
    """Run all jobs of a study that are not done. Interrupt it at any time; the same command continues.

    A failed job does not stop the others: it is reported at the end, and the exit status is 1.

    Example:

        hiplora study run smol --data benchmarks --workers 2 --allow-code-execution
    """
    from tqdm import tqdm

    from hiplora.study.execute import run_graph
    from hiplora.study.plan import check, status

    if executor == "local" and (address is not None or gpus_per_job):
        option = "--address" if address is not None else "--gpus-per-job"
        raise ConfigError(f"{option}: is for a Ray cluster; add --executor ray, or remove it")
    opened = study(allow_code=allow_code)
    check(opened)
    taken = sum(map(opened.store.take, reuse))
    total = len(opened.store.unfinished(opened.graph))
    with tqdm(total=total, unit="job", file=sys.stderr, disable=None, leave=False) as bar:
        ended = itertools.count(1)

        def on_event(event: str, job: Any) -> None:
            bar.set_postfix_str(job.name[:60])
            if event == "begin":
                return
            bar.update()
            if verbose:
                tqdm.write(f"{next(ended)}/{total}  {'FAILED ' * (event == 'failed')}{job.name}", file=sys.stderr)

        failed = run_graph(opened.graph, opened.place, workers, executor, address, gpus_per_job, on_event)
    state = {**status(opened), "taken": taken}
    _tell_failures(state)
    yield {"schema": 1, "kind": "study", **state}
    yield f"{state['jobs'] - state['left']:,} of {state['jobs']:,} jobs are done: {opened.store.path}"
    if failed:
        raise SystemExit(1)


@app.command()
@as_command
def status(study: Any = STUDY) -> Shown:
    """Show how far a study is, what is running, and what failed and why.

    Example:

        hiplora study status smol --data benchmarks
    """
    from hiplora.study.plan import status as status_of

    yield from _shown(status_of(study()))


@app.command()
@as_command
def report(
    study: Any = STUDY,
    to: Path | None = Option(None, help="Folder of the report; default `report` in the study's folder."),
    reuse: list[Path] = REUSE,
    overwrite: bool = Option(False, "--overwrite", help="Replace --to if it exists."),
) -> Shown:
    """Write tables, figures, measurements and one page of what a study found so far.

    Example:

        hiplora study report smol --data benchmarks --to docs/results/smol --overwrite
    """
    from hiplora.study.report import report as write

    opened = study()
    for path in reuse:
        opened.store.take(path)
    folder = to or opened.store.path / "report"
    record = write(opened, folder, overwrite or (to is None and (folder / "records.jsonl.gz").is_file()))
    yield {"schema": 1, "kind": "study-report", **record}
    yield from (f"{name}: waits for {missing:,} jobs" for name, missing in record["sections"].items() if missing)
    yield f"{record['measurements']:,} measurements: {record['page']}"


def _shown(state: dict[str, Any]) -> Shown:
    """Show how far a study is."""
    from hiplora.training.sequences import duration

    yield {"schema": 1, "kind": "study", **state}
    every = {"jobs": state["jobs"], "left": state["left"], "seconds": state["seconds_left"]}
    rows = [
        (kind, n["jobs"], n["jobs"] - n["left"], n["left"], "?" if n["seconds"] is None else duration(n["seconds"]))
        for kind, n in {**state["kinds"], "all": every}.items()
    ]
    yield f"{state['study']}: jobs", ("Kind", "jobs", "done", "left", "time of one worker"), rows
    if state["left"] and state["without_estimate"]:
        yield f"no estimate yet, and left out of the sum: {', '.join(state['without_estimate'])}"
    if state["peak_memory_bytes"] is not None:
        yield f"peak memory of a training: {state['peak_memory_bytes'] / 2**30:.1f} GiB"
    if state["missing_files"]:
        yield f"missing from the data folder: {', '.join(state['missing_files'])}"
    yield from (f"running: {name}" for name in state["at_work"])
    _tell_failures(state)


def _tell_failures(state: dict[str, Any]) -> None:
    for name, error in state["failed"].items():
        tell(f"failed: {name}: {error}")
    for reason in state["diverged"].values():
        tell(f"diverged: {reason}")
