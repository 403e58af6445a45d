"""The results of `hiplora compare`: read at equal learning, in words, as a table and as a page."""

import itertools
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from hiplora.evaluation.answers import changes
from hiplora.files import write_atomic
from hiplora.reporting import plots
from hiplora.reporting.html import Section, save_page

LEARNED = 0.02  # nats: a method that learned less has no drift to compare
SMALL = 0.01  # nats: of the next tokens of prose and code, four or five in a hundred are others
CURVES = {"trained": "at marks along the training", "scaled": "finished adapter, scaled down"}

Results = dict[str, Any]


def at_equal_learning(base: float, methods: Mapping[str, Results]) -> Results:
    """Return the lowest held-out loss that all methods reach, and for each what it disturbed there.

    `trained` is along the training, `scaled` along the scales of the finished adapter, None where these do not reach
    the loss. Between two points the square root of the divergence, which grows as the update does, is linear in it.
    """
    loss = max(min(point["held_out_loss"] for point in record["trained"]) for record in methods.values())
    reached = {
        name: {curve: _crossing(base, record[curve], loss) for curve in CURVES} for name, record in methods.items()
    }
    return {"loss": loss, "methods": reached}


def _crossing(base: float, points: Sequence[Results], loss: float) -> Results | None:
    """Return the drift of each text where a curve that begins at the base model first reaches a loss."""
    if base <= loss:  # the base model is there already
        return {text: {"kl": 0.0, "greedy_changed": 0.0} for text in points[0]["drift"]}
    curve: Sequence[Results] = [{"held_out_loss": base, "drift": {}}, *points]
    for before, after in itertools.pairwise(curve):
        if after["held_out_loss"] > loss:
            continue
        share = (before["held_out_loss"] - loss) / (before["held_out_loss"] - after["held_out_loss"])
        reached = {}
        for text, end in after["drift"].items():
            start = before["drift"].get(text, {"kl": 0.0, "greedy_changed": 0.0})
            root = (1 - share) * max(start["kl"], 0.0) ** 0.5 + share * max(end["kl"], 0.0) ** 0.5
            changed = (1 - share) * start["greedy_changed"] + share * end["greedy_changed"]
            reached[text] = {"kl": root**2, "greedy_changed": changed}
        return reached
    return None


def headline(results: Results) -> str:
    """Return what a comparison found, in a sentence."""
    loss, methods = results["equal"]["loss"], results["equal"]["methods"]
    base, runs = results["base"]["held_out_loss"], results["methods"]
    idle = [name for name in runs if all(point["held_out_loss"] > base for point in runs[name]["trained"])]
    if idle:
        return f"{' and '.join(idle)} learned nothing at this learning rate: lower it (--lr)."
    if base - loss < LEARNED:
        return "These steps taught too little to compare anything: train longer (--steps)."
    if (best := _best(methods)) is None:
        return f"What each method changed where all have reached a held-out loss of {loss:.3f}"
    less, more = sorted(best, key=lambda name: mean_of(best[name], "kl"))
    times = spread(best[more], best[less])
    return f"Where both have learned the same, {more} drifts {times} as far from the base as {less}."


def details(results: Results) -> str:
    """Return what the headline leaves out; empty where there is nothing to compare."""
    best = _best(results["equal"]["methods"])
    if best is None or results["base"]["held_out_loss"] - results["equal"]["loss"] < LEARNED:
        return ""
    changed = " and ".join(f"{mean_of(drift, 'greedy_changed'):.1%} with {name}" for name, drift in best.items())
    text = f"Next tokens chosen differently there, on other text: {changed}, each scaled down where that helps."
    if max(measure["kl"] for drift in best.values() for measure in drift.values()) < SMALL:
        text += " No method has moved the model far yet: train longer (--steps) to see."
    return text


def _best(methods: Mapping[str, Results]) -> dict[str, Mapping[str, Results]] | None:
    """Return the drift of a plain LoRA and of HiP-LoRA, each at its best: stopped there, or scaled down to it."""
    best = {}
    for kind in ("LoRA", "HiP-LoRA"):
        name = next((name for name in methods if name.startswith(kind)), None)
        if name is None:
            return None
        best[name] = min(filter(None, methods[name].values()), key=lambda drift: mean_of(drift, "kl"))
    return best


def summary(results: Results) -> pd.DataFrame:
    """Return the results as a table, a column a method: drift at the loss that all reach, and the cost."""
    columns = {}
    for name, record in results["methods"].items():
        reached = results["equal"]["methods"][name]
        columns[name] = {
            **{f"KL, {text}": drift["kl"] for text, drift in reached["trained"].items()},
            "next token changed": f"{mean_of(reached['trained'], 'greedy_changed'):.1%}",
            **{f"KL, {text}, scaled down": drift["kl"] for text, drift in (reached["scaled"] or {}).items()},
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


def mean_of(drift: Mapping[str, Results], measure: str) -> float:
    """Return the mean over the texts of one measure of drift."""
    return sum(text[measure] for text in drift.values()) / len(drift)


def spread(drift: Mapping[str, Results], other: Mapping[str, Results]) -> str:
    """Return how many times the divergence of the other one this is, from the text with the least to the most."""
    times = sorted(measure["kl"] / max(other[text]["kl"], 1e-9) for text, measure in drift.items())
    low, high = (f"{value:.2g}" if value < 10 else f"{value:,.0f}" for value in (times[0], times[-1]))
    return f"{low} times" if low == high else f"{low} to {high} times"


def write_report(results: Results, out: Path) -> None:
    """Write `report.html` and `results.json` into the folder of a comparison."""
    loss = results["equal"]["loss"]
    rows = [
        {
            "method": name,
            "curve": label,
            "at": f"step {point['step']}" if "step" in point else f"scale {point['scale']}",
            "held-out loss": point["held_out_loss"],
            **{f"KL, {text}": drift["kl"] for text, drift in point["drift"].items()},
            "KL": mean_of(point["drift"], "kl"),
        }
        for name, record in results["methods"].items()
        for curve, label in CURVES.items()
        for point in record[curve]
    ]
    points = pd.DataFrame(rows)
    figures = {
        f"Held-out loss against drift, {curve}; lower left is better": plots.lines(
            part,
            "KL",
            "held-out loss",
            "method",
            logx=True,
            xlabel="KL from the base model, nats per token, mean over the texts",
        )
        for curve, part in points.groupby("curve", sort=False)
    }
    adapted = ", ".join(f"{name} adapts {record['adapts']}" for name, record in results["methods"].items())
    text = (
        f"Every method trained on the same rows in the same order. Drift is read where each method reaches a held-out "
        f"loss of {loss:.3f}, the lowest that all reach (base model: {results['base']['held_out_loss']:.3f}): trained "
        f"just that far, or trained to the end and scaled down to it. {adapted}.\n\n"
    ) + "\n\n".join(filter(None, [details(results), *results["notes"]]))
    answers, expected = shown(results["answers"]), results["expected"]  # the answers on the task come first
    task = [row | {"expected": response} for row, response in zip(answers, expected, strict=False)]
    sections = [
        Section("Drift at equal learning", text, {f"At held-out loss {loss:.3f}": summary(results)}, figures),
        Section("What the models say about everything else", answers=answers[len(expected) :]),
        Section("What they say on your task", answers=task),
        Section("What to do next", code=next_steps(results, out)),
        Section("All points", tables={"Points": points}),
    ]
    about = {name: results[name] for name in ("model", "data", "settings")} | results["provenance"]
    subtitle = f"{results['model']} tuned on {results['data'].get('file', 'your data')}"
    save_page(out / "report.html", headline(results), sections, subtitle, about)
    write_atomic(out / "results.json", json.dumps(results, indent=1) + "\n")
