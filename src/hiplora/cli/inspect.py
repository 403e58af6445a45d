"""`hiplora inspect`: how much of an adapter lies in the directions that its base model depends on."""

from pathlib import Path
from typing import Any

from typer import Option

from hiplora.cli.common import ADAPTER, BASE, OVERWRITE, Shown, next_step

COLUMNS = ("Module", "‖ΔW‖", "written into", "read from", "both", "chance", "largest |δ|/σ", "leak")
MOST_ROWS = 16  # that are printed
_DIRECTIONS = {"protected": "directions that it protects", "singular": "leading singular directions"}


def command(
    adapter: Path = ADAPTER,
    base: str | None = BASE,
    rank: int | None = Option(
        None, min=1, help="Leading singular directions to look at; default the protected ones, or 32."
    ),
    html: Path | None = Option(None, help="Also write a report page to this file."),
    overwrite: bool = OVERWRITE,
) -> Shown:
    """Show where an adapter's update lies: on its own protected directions, or on the weights' leading ones.

    Per module: how much of the update's energy writes into protected output directions, reads from protected input
    directions, or does both, beside what a random update has in either; how far it moves their singular values; and,
    for HiP-LoRA, the leak. Without protected directions of its own, the leading singular directions count.

    Example:

        hiplora inspect runs/medicine --rank 16
    """
    from hiplora.adapters import has_words, inspect_adapter, read_update
    from hiplora.files import check_output_file

    if html is not None:
        check_output_file(html, overwrite, "--html")
    update = read_update(adapter, base)
    record = inspect_adapter(update, base, rank)
    where = _DIRECTIONS[record["directions"]]
    title = f"{record['adapter']} ({record['method']}) over {record['base']}: energy in the {where}"
    if html is not None:
        _save_page(html, record, title)
    yield record
    *rows, total = _rows(record)
    if len(rows) > MOST_ROWS:
        title += f"; the {MOST_ROWS} largest updates of {len(rows)} (all: --json, --html)"
        largest = sorted(range(len(rows)), key=lambda index: -record["modules"][index]["norm"])[:MOST_ROWS]
        rows = [rows[index] for index in sorted(largest)]
    yield title, COLUMNS, [*rows, total]
    yield record["verdict"]
    if html is not None:
        yield f"report: {html}"
    same = ["--base", base] if base else []
    if not has_words(update):
        yield next_step("hiplora", "export", adapter, *same, "--to", "dense", "--out", f"{adapter}-dense")
    elif record["directions"] == "protected" and record["summary"]["left"] + record["summary"]["right"] < 1e-6:
        yield next_step(
            "hiplora", "drift", base or record["base"], "--adapter", adapter, why="what it moves elsewhere"
        )
    else:
        yield next_step("hiplora", "protect", adapter, *same, "--out", f"{adapter}-protected")


def _rows(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the table's cells: a row for each module, and one for all."""
    total = {"module": "all", "gains": [], "sigma": [], "leak": record["summary"]["max_leak"]}
    rows = []
    for row in [*record["modules"], record["summary"] | total]:
        ratios = [abs(gain) / sigma for gain, sigma in zip(row["gains"], row["sigma"], strict=True) if sigma > 0]
        shares = (f"{100 * row[side]:.2f} %" for side in ("left", "right", "both", "chance"))
        gain, leak = f"{max(ratios):.1e}" if ratios else "", row["leak"]
        rows.append((row["module"], f"{row['norm']:.3g}", *shares, gain, "" if leak is None else f"{leak:.0e}"))
    return rows


def _save_page(path: Path, record: dict[str, Any], title: str) -> None:
    import pandas

    from hiplora.reporting import plots
    from hiplora.reporting.html import Section, save_page

    points = pandas.DataFrame(
        {"sigma": sigma, "gain": abs(gain), "type": row["type"]}
        for row in record["modules"]
        for sigma, gain in zip(row["sigma"], row["gains"], strict=True)
        if abs(gain) > 1e-9 * sigma > 0  # beyond rounding
    )
    figures = {}
    if len(points):
        axes: dict[str, Any] = {"xlabel": "σ", "ylabel": "|δ|", "logx": True, "logy": True}
        figures["Change of each leading singular value"] = plots.facets(
            points, "type", plots.scatter, x="sigma", y="gain", guides=(0.01, 0.1), **axes
        )
    table = pandas.DataFrame(_rows(record), columns=list(COLUMNS))
    shares = "Shares of each update's energy ‖ΔW‖² that is written into these output directions, read from these input"
    text = f"{record['verdict']}\n\n{shares} directions, or both."
    section = Section("Spectrum", text, tables={"Modules": table}, figures=figures)
    save_page(path, f"Inspection of {record['adapter']}", [section], subtitle=title)
