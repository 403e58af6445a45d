"""The merge report in words and rows: verdict, tiles and tables, for terminal and page alike."""

from collections.abc import Mapping, Sequence
from typing import Any

from hiplora.reporting._old_plots.broken import points
from hiplora.reporting.merge_results import Interval, MergeReport, Module, Task, read_merge_report
from hiplora.reporting.numbers import MISSING, fixed, hundredths, percent
from hiplora.reporting.summary import NEITHER, Tile
from hiplora.reporting.verdict import Verdict

MEASURED, UNRELATED = "these adapters", "unrelated updates"
# Adapters meet on a side where they share this many times what chance gives; they agree, or not, from this cosine on.
MEETING, AGREEING = 2.0, 0.1
_PAGE_CHARS, _TERMINAL_CHARS = 18, 11
WORST_COLUMNS = ("Module", "Between", "Score", "Outputs", "Inputs", "Cosine", "Signs", "Norm ratio")
MODULE_COLUMNS = (
    "Module", "Adapters", "Score", "Outputs shared", "Inputs shared", "Largest cosine", "Cosine", "Sign conflict",
    "Norm ratio", "… if unrelated",
)  # fmt: skip
TASK_COLUMNS = ("Task", "Metric", "Before", "After", "Change", "Interval")


def conflict_table(report: Mapping[str, Any]) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """Return title, columns and rows of the most conflicting modules, for a terminal (`print_table`).

    Score, overlaps and cosine are of the pair that conflicts most; signs and norm ratio are of all adapters.

    Raises:
        DataError: the dictionary is no merge report, or of another schema.
    """
    read = read_merge_report(report)
    rows = worst_rows(read, _TERMINAL_CHARS)
    if not rows:
        return verdict(read).headline, WORST_COLUMNS, []
    return f"Most conflicting modules ({len(rows)} of {len(read.modules)})", WORST_COLUMNS, rows


def worst_rows(report: MergeReport, limit: int = _PAGE_CHARS) -> list[tuple[str, ...]]:
    """Return a row of texts (`WORST_COLUMNS`) for each of the most conflicting modules, worst first.

    Adapters' names are shortened to `limit` characters.
    """
    return [
        (
            row.module,
            report.pair_name(row.worst.adapters, limit),
            hundredths(row.worst.score),
            percent(row.worst.left.mean),
            percent(row.worst.right.mean),
            hundredths(row.worst.cosine),
            percent(row.sign_conflict),
            hundredths(row.norm_ratio),
        )
        for row in report.most_conflicting
        if row.worst is not None
    ]


def module_rows(modules: Sequence[Module]) -> list[tuple[str, ...]]:
    """Return a row of texts (`MODULE_COLUMNS`) for each module; overlaps and cosine are means over the pairs."""
    return [
        (
            row.module,
            str(len(row.adapters)),
            hundredths(row.score),
            percent(row.left),
            percent(row.right),
            hundredths(row.largest_cosine),
            hundredths(row.cosine),
            percent(row.sign_conflict),
            hundredths(row.norm_ratio),
            hundredths(row.unrelated),
        )
        for row in modules
    ]


def task_rows(tasks: Sequence[Task]) -> list[tuple[str, ...]]:
    """Return a row of texts (`TASK_COLUMNS`) for each task."""
    return [
        (
            task.name,
            task.metric or MISSING,
            fixed(task.before, 1),
            fixed(task.after, 1),
            points(task.difference.estimate),
            interval_text(task.difference),
        )
        for task in tasks
    ]


def interval_text(interval: Interval) -> str:
    """Return an interval of points as text, or a dash where it is not known."""
    if interval.low is None or interval.high is None:
        return MISSING
    return f"{points(interval.low)} … {points(interval.high)}"


def tiles(report: MergeReport) -> list[Tile]:
    """Return the numbers of the whole merge, each beside what unrelated updates would give."""
    totals = report.totals
    if totals.get("left") is None:
        return []
    found = [
        _tile("Shared outputs", "directions written to", totals, "left", "left_chance"),
        _tile("Shared inputs", "directions read from", totals, "right", "right_chance"),
        _tile("Norm of the sum", "over the sum of the norms", totals, "norm_ratio", "unrelated"),
        _tile("Sign conflict", "magnitude that cancels", totals, "sign_conflict", "unrelated_sign_conflict"),
    ]
    return [tile for tile in found if tile is not None]


def verdict(report: MergeReport) -> Verdict:
    """Say in plain words whether the adapters meet and agree; before that, what it cost, where that was measured."""
    geometry = _geometry(report)
    if (cost := _cost(report)) is None:
        return geometry
    return Verdict(cost, (geometry.headline, *geometry.sentences))


def _cost(report: MergeReport) -> str | None:
    drop, tasks = report.evaluation.mean_drop, report.evaluation.tasks
    clear = sum(task.difference.high is not None and task.difference.high < 0 for task in tasks)
    lost = f"the drop is clear in {clear or 'none'} of {len(tasks)} scores"
    if drop.estimate is None:
        return f"After the merge, {lost}." if tasks else None
    known = drop.low is not None and drop.high is not None
    interval = f" ({fixed(drop.low, 1)} to {fixed(drop.high, 1)})" if known else ""
    mean = f"The mean drop after the merge is {fixed(drop.estimate, 1)} points{interval}"
    return f"{mean}; {lost}." if tasks else f"{mean}."


def _geometry(report: MergeReport) -> Verdict:
    if len(report.adapters) < 2:
        return Verdict("One adapter alone: there is nothing that it could conflict with.")
    left, right, cosine = (report.totals.get(name) for name in ("left", "right", "cosine"))
    if left is None or right is None or cosine is None:
        return Verdict("These adapters do not meet: no module is changed by two of them.")
    writing, reading = _meets(report, "left"), _meets(report, "right")
    if writing and reading:
        headline = (
            f"These adapters write to and read from some of the same directions, and {_agreement(cosine)}."
        )
    elif writing or reading:
        headline = (
            f"These adapters {'write to' if writing else 'read from'} some of the same directions, but "
            f"{'read from' if writing else 'write to'} others."
        )
    else:
        headline = "These adapters hardly meet: they share about as few directions as unrelated ones would."
    return Verdict(headline, tuple(_sentences(report)))


def _meets(report: MergeReport, side: str) -> bool:
    found, chance = report.totals.get(side), report.totals.get(f"{side}_chance")
    return found is not None and chance is not None and found > MEETING * chance


def _agreement(cosine: float) -> str:
    if cosine >= AGREEING:
        return "mostly agree there"
    return "work against each other there" if cosine <= -AGREEING else "neither agree nor disagree there"


def _sentences(report: MergeReport) -> list[str]:
    totals = report.totals
    who = "They" if len(report.adapters) == 2 else "Two of them"
    found = [
        f"{who} share {percent(totals.get('left'))} of the directions that they write to and "
        f"{percent(totals.get('right'))} of those that they read from; unrelated ones would share "
        f"{percent(totals.get('left_chance'))} and {percent(totals.get('right_chance'))}."
    ]
    if report.most_conflicting and (worst := report.most_conflicting[0].worst) is not None:
        found.append(
            f"They conflict most in {report.most_conflicting[0].module}: {report.pair_name(worst.adapters)}, score "
            f"{hundredths(worst.score)} of 1."
        )
    return found


def _tile(
    title: str, unit: str, totals: Mapping[str, float | None], key: str, unrelated_key: str
) -> Tile | None:
    measured, unrelated = totals.get(key), totals.get(unrelated_key)
    if measured is None or unrelated is None:
        return None
    values = {MEASURED: measured, UNRELATED: unrelated}
    texts = {name: percent(value) for name, value in values.items()}
    return Tile(title, unit, NEITHER, texts, {name: min(1.0, max(0.0, v)) for name, v in values.items()})
