"""`hiplora inspect`: how much of an adapter lies in the directions that its base model depends on."""

from pathlib import Path
from typing import Any

import typer

from hiplora.cli.common import JSON_OPTION, emit_json, print_table, progress


def command(
    adapter: Path = typer.Argument(..., help="Adapter folder: HiP-LoRA, Proj-LoRA, LoRA or AdaLoRA."),
    base: str | None = typer.Option(
        None, "--base", help="Base model, if not the one that the adapter names."
    ),
    rank: int | None = typer.Option(
        None, "--rank", min=1, help="Leading directions to look at; else the adapter's own k, or 32."
    ),
    as_json: bool = JSON_OPTION,
    html: Path | None = typer.Option(None, "--html", help="Also write a report page to this file."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the report page if it exists."),
) -> None:
    """Show where an adapter's update lies on the spectrum of the weights that it changes.

    Per module: how much of the update's energy writes into the weight's leading output directions, reads from its
    leading input directions, or does both; how far it moves the leading singular values; and, for HiP-LoRA, the leak.

    Example:

        hiplora inspect runs/medicine --rank 16
    """
    from hiplora.adapters import inspect_adapter
    from hiplora.files import check_output_file, write_atomic

    if html is not None:
        check_output_file(html, overwrite, "--html")
    record = inspect_adapter(
        adapter, base, rank, wrap=lambda names: progress(list(names), "inspecting modules")
    )
    if html is not None:
        from hiplora.reporting.page import render_inspection_html

        write_atomic(html, render_inspection_html(record))
    if as_json:
        emit_json(record)
        return
    _print(record)
    if html is not None:
        typer.echo(f"report: {html}")


def _print(record: dict[str, Any]) -> None:
    columns = ("Module", "‖ΔW‖", "written into", "read from", "both", "largest |δ|/σ", "leak")
    title = (
        f"{record['adapter']} ({record['method']}) over {record['base']}: energy in the top "
        f"{record['principal_rank']} singular directions"
    )
    rows = [
        (row["module"], f"{row['norm']:.3g}", *_percents(row), _gain(row), _leak(row["leak"]))
        for row in record["modules"]
    ]
    summary = record["summary"]
    rows.append(("all", f"{summary['norm']:.3g}", *_percents(summary), "", _leak(summary["max_leak"])))
    print_table(title, columns, rows)


def _percents(row: dict[str, Any]) -> list[str]:
    return [f"{100 * row[side]:.2f} %" for side in ("left", "right", "both")]


def _gain(row: dict[str, Any]) -> str:
    ratios = [abs(gain) / sigma for gain, sigma in zip(row["gains"], row["sigma"], strict=True) if sigma > 0]
    return f"{max(ratios):.1e}" if ratios else ""


def _leak(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"
