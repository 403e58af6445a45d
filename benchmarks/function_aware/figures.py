"""The figures of the experiment: frontiers of learning against drift, and edits against drift."""

from collections.abc import Sequence
from typing import Any

from hiplora.reporting.canvas import Panel, Plate, axes, plate_files
from hiplora.reporting.palette import LOOKS, Look

NAMES = {
    "lora-attention": "LoRA, attention",
    "lora-mlp": "LoRA, MLP",
    "weight-attention": "weight basis, attention",
    "activation-attention": "activation basis, attention",
    "activation-mlp": "activation basis, MLP",
}
_LOOK = {
    "lora-attention": LOOKS[1],
    "lora-mlp": LOOKS[4],
    "weight-attention": LOOKS[3],
    "activation-attention": LOOKS[2],
    "activation-mlp": LOOKS[0],
}
TITLES = {"prose": "WikiText", "python code": "Python code", "german": "German sentences"}


def figures(runs: Sequence[dict[str, Any]], summary: dict[str, Any]) -> dict[str, bytes]:
    """Return the figures that the runs have points for, by file name."""
    made = {}
    for task in dict.fromkeys(run["task"] for run in runs):
        made[f"frontier-{task}.svg"] = plate_files(_frontier(task, runs))["svg"]
    if summary["edits"]:
        made["edits.svg"] = plate_files(_edits(summary["edits"]))["svg"]
    return made


def _frontier(task: str, runs: Sequence[dict[str, Any]]) -> Plate:
    shown = [run for run in runs if run["task"] == task and run["variant"] in NAMES]
    panels = [_frontier_panel(text, title, shown) for text, title in TITLES.items()]
    job = {"gsm8k": "GSM8K", "code": "code instructions"}.get(task, task)
    legend = {NAMES[v]: _LOOK[v] for v in NAMES if any(run["variant"] == v for run in shown)}
    return Plate(f"frontier-{task}", f"Learning {job} against drift from the base model", "", panels, legend)


def _frontier_panel(text: str, title: str, runs: Sequence[dict[str, Any]]) -> Panel:
    def draw(container: Any) -> None:
        ax = axes(container, "held-out loss, nats per token", "KL from the base, nats per token", "both")
        for run in runs:
            look = _LOOK[run["variant"]]
            x = [point["heldout_loss"] for point in run["points"]]
            y = [point["kl"][text] for point in run["points"]]
            ax.plot(
                x, y, color=look.colour, marker=look.marker, markersize=5, linewidth=1.3, dashes=_dashes(look)
            )
        _logarithmic(ax)

    words = f"each line is one run, measured at three steps; lower and further left is better, on {title}"
    return Panel(f"frontier-{text}", f"Drift on {title}", words, draw, 350, 330)


def _logarithmic(ax: Any) -> None:
    """Let the vertical axis be logarithmic, its ticks plain numbers."""
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_minor_formatter(lambda value, _: "")


def _dashes(look: Look) -> tuple[Any, ...]:
    return look.dashes or (None, None)


def _edits(rows: dict[str, dict[str, Any]]) -> Plate:
    kinds = {"alone": "Each adapter alone", "merge2": "Two adapters added", "merge4": "Four adapters added"}
    shown = [row for row in rows.values() if row["variant"] in NAMES]
    panels = [_edits_panel(kind, title, shown) for kind, title in kinds.items()]
    legend = {NAMES[v]: _LOOK[v] for v in NAMES if any(row["variant"] == v for row in shown)}
    return Plate("edits", "Factual edits that work against drift from the base model", "", panels, legend)


def _edits_panel(kind: str, title: str, rows: Sequence[dict[str, Any]]) -> Panel:
    def draw(container: Any) -> None:
        ax = axes(container, "edits that work, %", "KL on WikiText, nats per token", "both")
        for row in rows:
            if kind not in row:
                continue
            look, success = _LOOK[row["variant"]], row[kind]["success"]
            x = 100 * success["share"]
            bars = [[x - 100 * success["low"]], [100 * success["high"] - x]]
            ax.errorbar(
                [x],
                [row[kind]["kl"]["prose"]],
                xerr=bars,
                color=look.colour,
                marker=look.marker,
                markersize=7,
                capsize=3,
            )
        _logarithmic(ax)
        ax.set_xlim(-3, 105)

    words = "one mark per method and learning rate, with the 95 % interval of its success; lower and right is better"
    return Panel(f"edits-{kind}", title, words, draw, 350, 330)
