"""`hiplora merge-check`: what a merge of adapters breaks, before it is written."""

from pathlib import Path
from typing import Any

from typer import Argument, Option

from hiplora.cli.common import BASE, OUT, OVERWRITE, Group, Shown, next_step, numbers
from hiplora.cli.eval import eval_settings
from hiplora.cli.merge import METHOD_HELP, SET, WEIGHTS, rule_options
from hiplora.merging.rules import find_rule


def command(
    adapters: list[str] = Argument(
        ..., help="Adapter folders over one base; as TASK=FOLDER, the task that each was trained for."
    ),
    settings: Any = Group(eval_settings),
    out: Path = OUT,
    method: list[str] = Option(
        ["addition"], help=f"{METHOD_HELP} May be repeated: the rules are judged side by side."
    ),
    weights: str | None = WEIGHTS,
    set: list[str] = SET,
    rank: int | None = Option(None, min=1, help="Recompress the merge to this rank."),
    sizes: str | None = Option(
        None, help="Also check every merge of this many adapters, for example 2,3; MergeFail counts over all of them."
    ),
    base: str | None = BASE,
    overwrite: bool = OVERWRITE,
) -> Shown:
    """Score adapters alone and merged on the same items, and report what the merge broke.

    For each task: the score before the merge (of the adapter that was trained for it), after it, the difference
    with its 95 % interval; MergeFail, the share of merges in which a task falls below τ of its score before, over a
    table of τ; and how the adapters conflict, module by module. The folder gets merge-check.json and report.html.

    After an interruption, the same command continues.

    Example:

        hiplora merge-check gsm8k=runs/maths arc_easy=runs/quiz --suite gsm8k,arc_easy --out runs/check
    """
    from hiplora.merge_check import MergeSettings, merge_check, verdict_notes, verdict_tables

    weight_list, size_list = numbers("--weights", weights, float) or None, tuple(numbers("--sizes", sizes, int))
    merging = MergeSettings(tuple(method), weight_list, rule_options(set), rank, base, size_list)
    record = merge_check(adapters, settings, merging, out, overwrite=overwrite)
    yield record
    yield from verdict_tables(record).items()
    yield from verdict_notes(record)
    yield f"\nWritten: {out}"
    merge_options = {"--weights": weights, "--rank": rank, "--base": base}
    options = [word for key, value in merge_options.items() if value is not None for word in (key, value)]
    defaults = find_rule(method[0]).defaults
    options += [word for text in set if text.partition("=")[0].strip() in defaults for word in ("--set", text)]
    merged = f"{out}-merged"
    yield next_step("hiplora", "merge", *record["adapters"].values(), "--method", method[0], *options, "--out", merged)
