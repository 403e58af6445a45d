"""`hiplora eval`: a base model and adapters on the same items, each score in two forms, with intervals."""

from pathlib import Path
from typing import Any

import typer

from hiplora.cli.common import DEVICE_OPTION, JSON_OPTION, emit_json, print_table

SUITE_OPTION = typer.Option(
    ...,
    "--suite",
    help="What to score on: paper, retention or quick; a file of your own rows (JSON lines, JSON or parquet, as for "
    "training); a YAML file; or comma-separated tasks, such as gsm8k,arc_easy (docs/reference/tasks.md lists them; "
    "lm-eval's own names work too).",
)
DATA_OPTION = typer.Option(
    None,
    "--data",
    help="Folder with the tasks' files, such as gsm8k_test.jsonl.gz. Default: $HIPLORA_DATA, else the hub.",
)
LIMIT_OPTION = typer.Option(None, "--limit", min=1, help="Items of each task, drawn by --seed. Default: all.")
SEED_OPTION = typer.Option(0, "--seed", min=0, help="Seed of the choice of items and of sampled responses.")
BATCH_OPTION = typer.Option(8, "--batch-size", min=1, help="Rows per batch.")
CODE_OPTION = typer.Option(
    False,
    "--allow-code-execution",
    help="Run code that the model writes, in a sandbox (docs/howto/code-execution.md).",
)
SUITE_CODE_OPTION = typer.Option(
    False,
    "--allow-suite-code",
    help="Let task files in the folders that a suite includes run their own code, which nothing confines.",
)


def command(
    model: str = typer.Argument(..., help="Base model: a folder, a hub name, or smollm2-135m."),
    adapter: list[str] = typer.Option([], "--adapter", help="Adapter folder, or NAME=FOLDER; may be repeated."),
    suite: str = SUITE_OPTION,
    out: Path = typer.Option(..., "--out", help="JSON file to write; it must not exist yet."),
    data: Path | None = DATA_OPTION,
    limit: int | None = LIMIT_OPTION,
    seed: int = SEED_OPTION,
    batch_size: int = BATCH_OPTION,
    allow_code: bool = CODE_OPTION,
    allow_suite_code: bool = SUITE_CODE_OPTION,
    device: str = DEVICE_OPTION,
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the file if it exists."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Score a base model, and adapters on it, on the tasks of a suite, with lm-eval.

    Before scoring, every adapter is checked to change the logits, and the base to come back bit for bit when it is
    off. All models see the same items in the same order; the file keeps the score of every item, and every mean and
    every difference of two models has a 95 % interval. A score is kept if it fell by less than a point, lost if it
    fell, and else one cannot tell. Each score has a second form, its likelihood: a small model is often at chance in
    accuracy while its likelihood still moves.

    After an interruption, the same command continues; scored models are kept.

    Example:

        hiplora eval smollm2-135m --adapter runs/medicine --suite retention --data benchmarks --out scores.json
    """
    from hiplora.evaluation.evaluate import EvalSettings, evaluate

    settings = EvalSettings(suite, data, limit, seed, batch_size, allow_code, allow_suite_code, device)
    results = evaluate(model, adapter, settings, out, overwrite=overwrite)
    if as_json:
        emit_json(results)
        return
    _print_scores(results)
    typer.echo(f"\nWritten: {out}")


def _print_scores(results: dict[str, Any]) -> None:
    base, *others = results["runs"]
    rows: list[list[str]] = []
    for task, described in results["tasks"].items():
        for form, metric in described["metrics"].items():
            if form in results["runs"][base][task]:
                scores = {name: run[task][form] for name, run in results["runs"].items()}
                apart = {row["of"]: row for row in results["differences"][task][form] if row["against"] == base}
                row = [f"{described['title']}: {metric}", _cell(scores[base])]
                for name in others:
                    row += [f"{scores[name]['estimate']:.1f}", _cell(apart[name], "+"), apart[name]["verdict"]]
                rows.append(row)
    items = [len(described["items"]) for described in results["tasks"].values()]
    title = f"{results['suite']}, {min(items)} to {max(items)} items per task; per cent, 95 % intervals"
    print_table(title, ("", base, *(head for name in others for head in (name, f"{name} − {base}", "verdict"))), rows)


def _cell(found: dict[str, Any], sign: str = "") -> str:
    return f"{found['estimate']:{sign}.1f} ({found['low']:{sign}.1f} to {found['high']:{sign}.1f})"
