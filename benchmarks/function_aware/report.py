"""Collect the runs of the experiment, compare them at equal loss, and draw the frontiers.

    python -m benchmarks.function_aware.report --runs FOLDER [--out docs/results/function-aware]

Writes runs.json (every run as it was measured), summary.json (what the documentation quotes) and the figures. Drift is
compared at equal held-out loss: a LoRA run's drift at another run's loss is interpolated between its measured steps
(linear in the loss, logarithmic in the divergence), never beyond them; a LoRA run that learned more with less counts
as it is, and so, in LoRA's favour, does the furthest that LoRA got, where it never got that far; and the lowest over
all of LoRA's targets and learning rates is taken. With several seeds, each is compared
with LoRA's runs of the same seed, and the interval is Student's t over the seeds' log ratios.
"""

import argparse
import itertools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.function_aware.figures import figures
from benchmarks.function_aware.run import HERE
from scipy import stats

from hiplora.files import write_atomic
from hiplora.provenance import json_sha256, provenance
from hiplora.reporting.plots import save_figure

OUT = HERE.parents[1] / "docs" / "results" / "function-aware"
ANSWERS = ("success", "paraphrase", "neighbours_kept")
TEXTS = ("prose", "python code", "german")
LORA = {"lora-any": ("lora-mlp", "lora-attention", "lora-all"), "lora-attention": ("lora-attention",)}


def drift_at(runs: Iterable[dict[str, Any]], loss: float, text: str) -> float | None:
    """Return the lowest divergence at which some of these runs learned at least this much; None where there are none.

    Where none got that far, the divergence at the lowest loss that one reached, which is less than it would be there.
    """
    found, runs = [], list(runs)
    for run in runs:
        found += [point["kl"][text] for point in run["points"] if point["heldout_loss"] <= loss]
        for one, two in itertools.pairwise(run["points"]):
            high, low = one["heldout_loss"], two["heldout_loss"]
            if low <= loss <= high and high > low:
                share = (high - loss) / (high - low)
                first, second = math.log(one["kl"][text]), math.log(two["kl"][text])
                found.append(math.exp(first + share * (second - first)))
    if not found:
        furthest = min((p for run in runs for p in run["points"]), key=lambda p: p["heldout_loss"], default=None)
        return furthest and furthest["kl"][text]
    return min(found)


def compared(run: dict[str, Any], runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Say how many times less a run drifts than LoRA at its own loss, at each of its steps and on each text."""
    peers = [r for r in runs if r["task"] == run["task"] and r["seed"] == run["seed"]]
    rows = []
    for point in run["points"]:
        row: dict[str, Any] = {key: point[key] for key in ("step", "heldout_loss", "kl")}
        for name, variants in LORA.items():
            rivals = [r for r in peers if r["variant"] in variants]
            drifts = {text: drift_at(rivals, point["heldout_loss"], text) for text in TEXTS}
            row[f"times_less_than_{name}"] = {t: kl / point["kl"][t] if kl else None for t, kl in drifts.items()}
        rows.append(row)
    return {key: run[key] for key in ("task", "variant", "lr", "seed", "trainable_parameters")} | {"steps": rows}


def over_seeds(compared_runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return geometric means over the seeds of a variant at its last step, with 95 % intervals, from three seeds on."""
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for run in compared_runs:
        groups[run["task"], run["variant"], run["lr"]].append(run["steps"][-1])
    rows = []
    for (task, variant, lr), points in groups.items():
        if len(points) < 3:
            continue
        row: dict[str, Any] = {"task": task, "variant": variant, "lr": lr, "seeds": len(points)}
        row["heldout_loss"] = _interval([point["heldout_loss"] for point in points])
        row["kl"] = {text: _interval([p["kl"][text] for p in points], log=True) for text in TEXTS}
        for name in LORA:
            key = f"times_less_than_{name}"
            values = {text: [p[key][text] for p in points] for text in TEXTS}
            row[key] = {t: _interval(v, log=True) if all(v) else None for t, v in values.items()}
        rows.append(row)
    return rows


def _interval(values: Sequence[float], log: bool = False) -> dict[str, float]:
    numbers = [math.log(v) for v in values] if log else list(values)
    middle = statistics.fmean(numbers)
    half = stats.t.ppf(0.975, len(numbers) - 1) * statistics.stdev(numbers) / math.sqrt(len(numbers))
    back = math.exp if log else float
    return {"mean": back(middle), "low": back(middle - half), "high": back(middle + half)}


def against(runs: Sequence[dict[str, Any]], without: str) -> dict[str, Any]:
    """Compare each variant with gains with the one that has none, seed by seed: loss difference and ratios of drift."""
    last = {(run["variant"], run["lr"], run["seed"]): run["points"][-1] for run in runs if run["task"] == "gsm8k"}
    rows = {}
    for variant, lr in sorted({(v, lr) for v, lr, _ in last if v.startswith(f"{without}-gains")}):
        seeds = [s for v, rate, s in last if (v, rate) == (variant, lr) and (without, lr, s) in last]
        if len(seeds) < 3:
            continue
        pairs = [(last[variant, lr, seed], last[without, lr, seed]) for seed in sorted(seeds)]
        rows[f"{variant}-lr{lr:g}"] = {
            "seeds": len(pairs),
            "loss_difference": _interval([a["heldout_loss"] - b["heldout_loss"] for a, b in pairs]),
            "kl_ratio": {t: _interval([a["kl"][t] / b["kl"][t] for a, b in pairs], log=True) for t in TEXTS},
        }
    return rows


def edits(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, per variant and learning rate, what the edit adapters do alone and added together."""
    groups: dict[tuple, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run["task"].startswith(("edits", "merge")):
            kind = run["task"] if run["task"].startswith("merge") else "alone"
            groups[run["variant"], run["lr"], run["seed"]][kind].append(run)
    rows = []
    for (variant, lr, seed), kinds in groups.items():
        row: dict[str, Any] = {"variant": variant, "lr": lr, "seed": seed}
        for kind, found in kinds.items():
            points = [run["points"][-1] if "points" in run else run for run in found]
            row[kind] = {name: _share([value for point in points for value in point[name]]) for name in ANSWERS} | {
                "kl": {text: statistics.fmean(p["kl"][text] for p in points) for text in TEXTS}
            }
        rows.append(row)
    return rows


def _share(successes: Sequence[bool]) -> dict[str, float]:
    """Return a share with its 95 % interval (Wilson)."""
    result = stats.binomtest(sum(successes), len(successes))
    low, high = map(float, result.proportion_ci(method="wilson"))
    return {"share": result.statistic, "low": low, "high": high, "count": len(successes)}


def main() -> None:
    """Write results, summary and figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(args.runs.glob("*.json"))]
    base = next((run for run in runs if run["task"] == "base"), None)
    trained = [run for run in runs if not run["task"].startswith(("edits", "merge", "base"))]
    ours = [compared(run, trained) for run in trained]
    recipe = (args.out / "recipe.yaml").read_text(encoding="utf-8")
    origin = provenance(recipe_sha256=json_sha256([recipe]), seeds=sorted({run["seed"] for run in runs}))
    summary = {
        "by_run": {_name(run): run for run in ours},
        "by_variant": {f"{r['task']}-{r['variant']}-lr{r['lr']:g}": r for r in over_seeds(ours)},
        "gains": against(trained, "activation-mlp"),
        "edits": {f"{row['variant']}-lr{row['lr']:g}": row for row in edits(runs)},
        "base": {name: _share(base[name]) for name in ANSWERS} if base else None,
        "provenance": origin,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out / "runs.json", json.dumps({"runs": runs, "provenance": origin}, indent=1) + "\n")
    write_atomic(args.out / "summary.json", json.dumps(summary, indent=1) + "\n")
    for name, figure in figures(trained, summary).items():
        save_figure(figure, args.out / name)
    print(f"{len(runs)} runs in {args.out}")


def _name(run: dict[str, Any]) -> str:
    return f"{run['task']}-{run['variant']}-lr{run['lr']:g}-seed{run['seed']}"


if __name__ == "__main__":
    main()
