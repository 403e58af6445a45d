"""What a merge broke, as tables: for `hiplora merge --evaluate` and `hiplora merge-check`."""

from typing import Any

import typer

from hiplora.cli.common import print_table


def print_verdicts(record: dict[str, Any]) -> None:
    """Print what each rule broke: a table of the tasks, and MergeFail over τ."""
    for method, forms in record["verdicts"].items():
        rows = [
            [f"{record['tasks'][task]['title']}: {row['metric']}", row["before_of"], *_changed(row)]
            for judged in forms.values()
            for task, row in {**judged["tasks"], **judged["kept"]}.items()
        ]
        columns = ("", "before, of", "before", "after", "difference, 95 %")
        print_table(f"{method}: scores before and after, per cent", columns, rows)
        _print_fails(method, forms)
        for note in dict.fromkeys(note for judged in forms.values() for note in judged["notes"]):
            typer.echo(note)


def _print_fails(method: str, forms: dict[str, Any]) -> None:
    first = next(iter(forms.values()))
    merges = first["instances"]
    rows = [
        [f"fails at τ = {tau}", *(_fail(judged["merge_fail"].get(tau), merges) for judged in forms.values())]
        for tau in first["merge_fail"]
    ]
    rows.append(["mean |drop|, points", *(_interval(judged["mean_drop"]) for judged in forms.values())])
    of = "1 merge (in how many redrawn sets of items it fails)" if merges == 1 else f"{merges} merges"
    print_table(f"{method}: MergeFail of {of}", ("", *(f"by {form}" for form in forms)), rows)


def _changed(row: dict[str, Any]) -> list[str]:
    from hiplora.reporting.numbers import signed

    found = row["difference"]
    difference, low, high = (signed(found[key], 1) for key in ("estimate", "low", "high"))
    return [f"{row['before']:.1f}", f"{row['after']:.1f}", f"{difference} ({low} to {high})"]


def _interval(found: dict[str, float] | None) -> str:
    return "" if found is None else f"{found['estimate']:.1f} ({found['low']:.1f} – {found['high']:.1f})"


def _fail(found: dict[str, float] | None, merges: int) -> str:
    if found is None:
        return ""
    if merges == 1:
        return f"{'yes' if found['estimate'] else 'no'} ({found['share']:.0%})"
    return f"{found['estimate']:.0%} ({found['low']:.0%} – {found['high']:.0%})"
