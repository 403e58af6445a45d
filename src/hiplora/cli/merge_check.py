"""`hiplora merge-check`: what a merge of adapters breaks, before it is written."""

from pathlib import Path

import typer

from hiplora.cli.common import JSON_OPTION, OUT_OPTION, OVERWRITE_OPTION, emit_json, print_frame
from hiplora.cli.eval import (
    BATCH_OPTION,
    CODE_OPTION,
    DATA_OPTION,
    LIMIT_OPTION,
    SEED_OPTION,
    SUITE_CODE_OPTION,
    SUITE_OPTION,
)
from hiplora.cli.merge import BASE_OPTION, METHOD_HELP, SET_HELP, WEIGHTS_HELP, parse_option, parse_weights
from hiplora.errors import ConfigError


def command(
    adapters: list[str] = typer.Argument(
        ..., help="Adapter folders over one base; as TASK=FOLDER, the task that each was trained for."
    ),
    suite: str = SUITE_OPTION,
    out: Path = OUT_OPTION,
    method: list[str] = typer.Option(
        ["addition"], "--method", help=f"{METHOD_HELP} May be repeated: the rules are judged side by side."
    ),
    weights: str | None = typer.Option(None, "--weights", help=WEIGHTS_HELP),
    set_: list[str] = typer.Option([], "--set", metavar="KEY=VALUE", help=SET_HELP),
    rank: int | None = typer.Option(None, "--rank", min=1, help="Recompress the merge to this rank."),
    sizes: str | None = typer.Option(
        None,
        "--sizes",
        help="Also check every merge of this many adapters, for example 2,3; MergeFail counts over all of them.",
    ),
    base: str | None = BASE_OPTION,
    data: Path | None = DATA_OPTION,
    limit: int | None = LIMIT_OPTION,
    seed: int = SEED_OPTION,
    batch_size: int = BATCH_OPTION,
    allow_code: bool = CODE_OPTION,
    allow_suite_code: bool = SUITE_CODE_OPTION,
    overwrite: bool = OVERWRITE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Score adapters alone and merged on the same items, and report what the merge broke.

    For each task: the score before the merge (of the adapter that was trained for it), after it, the difference
    with its 95 % interval; MergeFail, the share of merges in which a task falls below τ of its score before, over a
    table of τ; and how the adapters conflict, module by module. The folder gets merge-check.json and report.html.

    After an interruption, the same command continues.

    Example:

        hiplora merge-check gsm8k=runs/maths humaneval=runs/code --suite gsm8k,humaneval --out runs/check
    """
    from hiplora.evaluation.evaluate import EvalSettings
    from hiplora.merge_check import MergeSettings, merge_check, verdict_notes, verdict_tables

    settings = EvalSettings(suite, data, limit, seed, batch_size, allow_code, allow_suite_code)
    options = dict(map(parse_option, set_))
    how = MergeSettings(tuple(method), parse_weights(weights), options, rank, base, _sizes(sizes))
    record = merge_check(adapters, settings, how, out, overwrite=overwrite)
    if as_json:
        emit_json(record)
        return
    for caption, table in verdict_tables(record).items():
        print_frame(caption, table)
    for note in verdict_notes(record):
        typer.echo(note)
    typer.echo(f"\nWritten: {out}")


def _sizes(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise ConfigError(f"--sizes {text}: expected whole numbers separated by commas, for example 2,3") from None
