"""What `hiplora compare` found, in words, as a table and as a page."""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from hiplora.evaluation.answers import changes
from hiplora.files import write_atomic
from hiplora.reporting import Section, plots, save_page

LEARNED = 0.02  # nats: a method that learned less has no drift to compare
SMALL = 0.01  # nats: about one token in twenty-five is another one
CURVES = {"trained": "at marks along the training", "scaled": "finished adapter, scaled down"}

Results = dict[str, Any]


def headline(results: Results) -> str:
    """Return what a comparison found, in two sentences at most."""
    loss, methods = results["equal"]["loss"], results["equal"]["methods"]
    if results["base"]["held_out_loss"] - loss < LEARNED:
        return "These steps taught too little to compare anything: train longer (--steps)."
    # Each at its best: stopped there, or trained to the end and scaled down to it.
    least = {
        name: min(filter(None, ways.values()), key=lambda one: mean_of(one, "kl")) for name, ways in methods.items()
    }
    plain, ours = (next((name for name in least if name.startswith(kind)), None) for kind in ("LoRA", "HiP-LoRA"))
    if plain is None or ours is None:
        return f"What each method changed where all have reached a held-out loss of {loss:.3f}"
    changed = " and ".join(f"{mean_of(least[name], 'greedy_changed'):.1%} with {name}" for name in (plain, ours))
    said = (
        f"Where both have learned the same, {plain} has moved the model {spread(least[plain], least[ours])} as far on "
        f"other text as {ours}, each scaled down where that helps. Next tokens chosen differently there: {changed}."
    )
    if max(found["kl"] for texts in least.values() for found in texts.values()) < SMALL:
        said += " No method has moved the model far yet: train longer (--steps) to see."
    return said


def summary(results: Results) -> pd.DataFrame:
    """Return the results as a table, a column a method: drift at the loss that all reach, and the cost."""
    columns = {}
    for name, record in results["methods"].items():
        reached = results["equal"]["methods"][name]
        columns[name] = {
            **{f"KL, {text}": found["kl"] for text, found in reached["trained"].items()},
            "next token changed": f"{mean_of(reached['trained'], 'greedy_changed'):.1%}",
            **{f"KL, {text}, scaled down": found["kl"] for text, found in (reached["scaled"] or {}).items()},
            "held-out loss at the end": record["trained"][-1]["held_out_loss"],
            "learning rate": f"{record['lr']:g}",
            "training, minutes": f"{record['seconds'] / 60:.1f}",
        }
    return pd.DataFrame(columns).rename_axis(index="")


def next_steps(results: Results, out: str | os.PathLike) -> str:
    """Return what to do with the adapters, as commands."""
    key = "hiplora" if "hiplora" in results["settings"]["methods"] else results["settings"]["methods"][-1]
    adapter, steps = Path(out) / "adapters" / key, results["settings"]["steps"]
    folder, lora, recipe = (shlex.quote(str(path)) for path in (adapter, Path(out) / "lora", adapter / "recipe.yaml"))
    return (
        f"Use it:       hiplora export {folder} --to lora --out {lora}\n"
        f"Train longer: hiplora train {recipe} --set train.steps={5 * steps} --out runs/longer"
    )


def shown(rows: Sequence[Results]) -> list[Results]:
    """Return rows of `prompt` and what each model `said`, the base first, with the differences from it for a page."""
    return [
        {**row, "said": {name: changes(row["said"]["base"], text) for name, text in row["said"].items()}}
        for row in rows
    ]


def mean_of(drift: Mapping[str, Results], what: str) -> float:
    """Return the mean over the texts of one measure of drift."""
    return sum(text[what] for text in drift.values()) / len(drift)


def spread(drift: Mapping[str, Results], other: Mapping[str, Results]) -> str:
    """Return how many times the divergence of the other one this is, from the least text to the most."""
    times = sorted(found["kl"] / max(other[text]["kl"], 1e-9) for text, found in drift.items())
    low, high = (f"{value:.2g}" if value < 10 else f"{value:,.0f}" for value in (times[0], times[-1]))
    return f"{low} times" if low == high else f"{low} to {high} times"


def write_report(results: Results, out: Path) -> None:
    """Write `report.html` and `results.json` into the folder of a comparison."""
    loss = results["equal"]["loss"]
    rows = [
        {
            "method": name,
            "curve": told,
            "at": f"step {point['step']}" if "step" in point else f"scale {point['scale']}",
            "held-out loss": point["held_out_loss"],
            **{f"KL, {text}": found["kl"] for text, found in point["drift"].items()},
            "KL": mean_of(point["drift"], "kl"),
        }
        for name, record in results["methods"].items()
        for curve, told in CURVES.items()
        for point in record[curve]
    ]
    points = pd.DataFrame(rows)
    label = "KL from the base model, nats per token, mean over the texts"
    figures = {
        f"Learned against disturbed, {curve}; lower left is better": plots.lines(
            part, "KL", "held-out loss", "method", logx=True, xlabel=label
        )
        for curve, part in points.groupby("curve", sort=False)
    }
    adapted = ", ".join(f"{name} adapts {record['adapts']}" for name, record in results["methods"].items())
    text = (
        f"Every method trained on the same rows in the same order. Drift is read where each method reaches a held-out "
        f"loss of {loss:.3f}, the lowest that all reach (base model: {results['base']['held_out_loss']:.3f}): trained "
        f"just that far, or trained to the end and scaled down to it. {adapted}.\n\n" + "\n\n".join(results["notes"])
    )
    own, answers = len(results["expected"]), shown(results["answers"])
    task = [row | {"expected": right} for row, right in zip(answers, results["expected"], strict=False)]
    sections = [
        Section("Drift at equal learning", text, {f"At held-out loss {loss:.3f}": summary(results)}, figures),
        Section("What the models say about everything else", answers=answers[own:]),
        Section("What they say on your task", answers=task),
        Section("What to do next", code=next_steps(results, out)),
        Section("All points", tables={"Points": points}),
    ]
    about = {name: results[name] for name in ("model", "data", "settings")} | results["provenance"]
    subtitle = f"{results['model']} tuned on {results['data'].get('file', 'your data')}"
    save_page(out / "report.html", headline(results), sections, subtitle, about)
    write_atomic(out / "results.json", json.dumps(results, indent=1) + "\n")
