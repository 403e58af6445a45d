"""`hiplora eval`: a base model and adapters on the same items, each score in two forms, with intervals."""

from pathlib import Path
from typing import Any

from typer import Option

from hiplora.cli.common import ADAPTERS, DEVICE, MODEL, OVERWRITE, Group, Shown, next_step

SUITE_HELP = (
    "What to score on: paper, retention or quick; a file of your own rows (JSON lines, JSON or parquet, as for "
    "training); a YAML file; or comma-separated tasks, such as gsm8k,arc_easy (docs/reference/tasks.md lists them; "
    "lm-eval's own names work too)."
)
SUITE_CODE_HELP = "Let task files in the folders that a suite includes run their own code, which nothing confines."


def eval_settings(
    suite: str = Option(..., help=SUITE_HELP),
    data: Path | None = Option(
        None, help="Folder with the tasks' files, such as gsm8k_test.jsonl.gz. Default: $HIPLORA_DATA, else the hub."
    ),
    limit: int | None = Option(None, min=1, help="Items of each task, drawn by --seed. Default: all."),
    seed: int = Option(0, min=0, help="Seed of the choice of items and of sampled responses."),
    batch_size: int = Option(8, min=1, help="Rows per batch."),
    allow_code: bool = Option(
        False,
        "--allow-code-execution",
        help="Run code that the model writes, in a sandbox (docs/howto/code-execution.md).",
    ),
    allow_suite_code: bool = Option(False, "--allow-suite-code", help=SUITE_CODE_HELP),
    device: str = DEVICE,
) -> Any:
    """What models are scored on, and how."""
    options = dict(locals())
    from hiplora.evaluation.evaluate import EvalSettings

    return EvalSettings(**options)


def command(
    model: str = MODEL,
    adapter: list[str] = ADAPTERS,
    settings: Any = Group(eval_settings),
    out: Path = Option(..., help="JSON file to write; it must not exist yet."),
    overwrite: bool = OVERWRITE,
) -> Shown:
    """Score a base model, and adapters on it, on the tasks of a suite, with lm-eval.

    Before scoring, every adapter is checked to change the logits, and the base to come back bit for bit when it is
    off. All models see the same items in the same order; the file keeps the score of every item, and every mean and
    every difference of two models has a 95 % interval. A score is kept if the whole interval lies above -1 point, else
    lost if it lies below zero, else one cannot tell. Each score has a second form, its likelihood: a small model is
    often at chance in accuracy while its likelihood still moves.

    After an interruption, the same command continues; scored models are kept.

    Example:

        hiplora eval smollm2-135m --adapter runs/medicine --suite retention --data benchmarks --out scores.json
    """
    from hiplora.evaluation.evaluate import evaluate

    results = evaluate(model, adapter, settings, out, overwrite=overwrite)
    yield results
    base, *others = results["runs"]
    rows: list[list[str]] = []
    lost: list[str] = []
    for task, described in results["tasks"].items():
        for form, metric in described["metrics"].items():
            if form in results["runs"][base][task]:
                scores = {name: run[task][form] for name, run in results["runs"].items()}
                differences = {row["of"]: row for row in results["differences"][task][form] if row["against"] == base}
                row = [f"{described['title']}: {metric}", _cell(scores[base])]
                for name in others:
                    difference = differences[name]
                    if difference["verdict"] == "lost":
                        lost.append(name)
                    row += [f"{scores[name]['estimate']:.1f}", _cell(difference, "+"), difference["verdict"]]
                rows.append(row)
    items = [len(described["items"]) for described in results["tasks"].values()]
    span = " to ".join(map(str, sorted({min(items), max(items)})))
    title = f"{results['suite']}, {span} items per task; per cent, 95 % intervals"
    yield title, ("", base, *(head for name in others for head in (name, f"{name} − {base}", "verdict"))), rows
    yield f"\nWritten: {out}"
    if not others:
        data = ("--data", settings.data) if settings.data else ()
        more = ("--adapter", "DIR", "--suite", settings.suite, *data, "--out", "FILE")
        yield next_step("hiplora", "eval", model, *more, why="score an adapter too")
    elif lost:
        yield next_step("hiplora", "protect", results["adapters"][lost[0]], "--out", "DIR", why="lose less")
    else:
        folder = results["adapters"][others[0]]
        yield next_step("hiplora", "generate", model, "--adapter", folder, "--prompt", "…", why="see its answers")


def _cell(value: dict[str, Any], sign: str = "") -> str:
    return f"{value['estimate']:{sign}.1f} ({value['low']:{sign}.1f} to {value['high']:{sign}.1f})"
