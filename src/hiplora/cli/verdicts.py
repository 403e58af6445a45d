"""What a merge broke, as tables: for `hiplora merge --evaluate` and `hiplora merge-check`."""

from typing import Any

import typer

from hiplora.cli.common import print_table


def print_verdicts(record: dict[str, Any]) -> None:
    """Print what each rule broke: a table of the tasks, and MergeFail over τ."""
    for method, forms in record["verdicts"].items():
        rows: list[list[str]] = []
        for judged in forms.values():
            for task, row in {**judged["tasks"], **judged["kept"]}.items():
                title = f"{record['tasks'][task]['title']}: {row['metric']}"
                rows.append([title, row["before_of"], *_changed(row)])
        columns = (
            "",
            "before, of",
            "before",
            "after",
            "difference, 95 %",
        )
        print_table(f"{method}: scores before and after, per cent", columns, rows)
        taus = list(next(iter(forms.values()))["merge_fail"])
        fails = [
            [form, *(_share(judged["merge_fail"].get(tau)) for tau in taus), _interval(judged["mean_drop"])]
            for form, judged in forms.items()
        ]
        merges = next(iter(forms.values()))["instances"]
        print_table(
            f"{method}: MergeFail of {merges} merge{'s' if merges != 1 else ''}, over τ",
            ("by", *(f"τ = {tau}" for tau in taus), "mean |drop|, pp"),
            fails,
        )
        for note in dict.fromkeys(note for judged in forms.values() for note in judged["notes"]):
            typer.echo(note)


def _changed(row: dict[str, Any]) -> list[str]:
    return [f"{row['before']:.1f}", f"{row['after']:.1f}", _interval(row["difference"], sign="+")]


def _interval(found: dict[str, float] | None, sign: str = "") -> str:
    if found is None:
        return ""
    return f"{found['estimate']:{sign}.1f} ({found['low']:{sign}.1f} – {found['high']:{sign}.1f})"


def _share(found: dict[str, float] | None) -> str:
    return "" if found is None else f"{found['estimate']:.0%} ({found['low']:.0%} – {found['high']:.0%})"
