"""The figures of the experiment: frontiers of learning against drift, and edits against drift."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from hiplora.reporting import plots

NAMES = {
    "lora-attention": "LoRA",
    "lora-mlp": "LoRA on the MLPs",
    "weight-attention": "HiP-LoRA (paper)",
    "activation-attention": "function-aware, on attention",
    "activation-mlp": "HiP-LoRA",
}
TITLES = {"prose": "WikiText", "python code": "Python code", "german": "German sentences"}
KINDS = {"alone": "Each adapter alone", "merge2": "Two adapters added", "merge4": "Four adapters added"}
_KL = "KL, nats per token"


def figures(runs: Sequence[dict[str, Any]], summary: dict[str, Any]) -> dict[str, Figure]:
    """Return the figures that the runs have points for, by file name without its ending."""
    made = {f"frontier-{task}": _frontier(task, runs) for task in dict.fromkeys(run["task"] for run in runs)}
    if summary["edits"]:
        made["edits"] = _edits(summary["edits"])
    return made


def _frontier(task: str, runs: Sequence[dict[str, Any]]) -> Figure:
    """Draw a line a run, measured at three steps."""
    rows = []
    for run in runs:
        if run["task"] == task and run["variant"] in NAMES:
            for text, title in TITLES.items():
                about = {"method": NAMES[run["variant"]], "text": title}
                rows += [{**about, "loss": p["heldout_loss"], "kl": p["kl"][text]} for p in run["points"]]
                rows.append({**about, "loss": None, "kl": None})  # the line ends here
    axes = {"xlabel": "held-out loss, nats per token", "ylabel": _KL, "logy": True}
    return plots.facets(pd.DataFrame(rows), "text", plots.lines, x="loss", y="kl", line="method", **axes)


def _edits(found: Mapping[str, dict[str, Any]]) -> Figure:
    """Draw a mark a method and learning rate, with the 95 % interval of its success."""
    rows = [
        {
            "method": NAMES[row["variant"]],
            "kind": title,
            "works": 100 * row[kind]["success"]["share"],
            "low": 100 * row[kind]["success"]["low"],
            "high": 100 * row[kind]["success"]["high"],
            "kl": row[kind]["kl"]["prose"],
        }
        for row in found.values()
        for kind, title in KINDS.items()
        if row["variant"] in NAMES and kind in row
    ]
    columns = {"x": "works", "y": "kl", "line": "method", "x_low": "low", "x_high": "high"}
    axes = {"xlabel": "edits that work, %", "ylabel": "KL on WikiText, nats per token", "logy": True}
    return plots.facets(pd.DataFrame(rows), "kind", plots.lines, **columns, **axes)
