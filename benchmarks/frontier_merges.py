"""What becomes of the long frontier's adapters when two are merged: one of GSM8K and one of code, of one method.

    python -m benchmarks.frontier_merges run    --data FOLDER --out FOLDER [--method hiplora ...] [--seeds 0 1 2]
    python -m benchmarks.frontier_merges report --out FOLDER --to FOLDER

`run` merges every pair of finished adapters (`benchmarks.frontier run` leaves them in `OUT/adapters`) by each rule and
measures both tasks' held-out loss and the drift, a JSON file a merge, as the frontier does for single adapters.
`report` counts which merges fail: MergeFail's rule, with the likelihood of a token, 100·exp(−loss), as the score.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import operator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from benchmarks.frontier import RECIPE, Bench, Run, once
from benchmarks.frontier_report import TITLES

from hiplora.evaluation import heldout_loss, measure_drift
from hiplora.evaluation.mounting import applied, holding
from hiplora.merging import merge
from hiplora.metrics import mean_post_merge_drop, merge_fail

TASKS = ("gsm8k", "code")
RULES = ("addition", "ties")
TAUS = (0.9, 0.95)


def measure(bench: Bench, rule: str, pair: tuple[Run, ...], held: dict[str, list[Any]]) -> dict[str, Any]:
    """Merge two runs' adapters, and return each task's loss on its held rows, merged and alone, and the drift."""
    merged = merge([bench.adapter(run) for run in pair], rule)
    whole = {name: bench.model.get_parameter(name) for name in (f"{module}.weight" for module in merged.modules)}
    with applied(bench.model, merged) as model:
        losses = {run.task: heldout_loss(model, held[run.task]) for run in pair}
        drift = measure_drift(model, bench.reference, functools.partial(holding, model, whole))
    alone = {}
    for run in pair:
        points = json.loads((bench.out / f"{run.name}.json").read_text())["points"]
        alone[run.task] = next(p["heldout_loss"] for p in reversed(points) if p["scale"] == 1)
    return {
        "rule": rule,
        "method": pair[0].method,
        "seeds": {run.task: run.seed for run in pair},
        "merged": losses,
        "alone": alone,
        "kl": {name: text.kl for name, text in drift.items()},
    }


def work(bench: Bench, methods: list[str], rate: float, seeds: list[int]) -> None:
    """Measure every merge that is not measured yet and whose adapters are there."""
    held = {task: bench.examples(task)[1] for task in TASKS}
    for method, rule, one, two in itertools.product(methods, RULES, seeds, seeds):
        pair = Run(TASKS[0], method, rate, one), Run(TASKS[1], method, rate, two)
        if all(bench.adapter(run).exists() for run in pair):
            once(
                bench.out,
                f"merge-{rule}-{method}-{one}-{two}",
                lambda pair=pair, rule=rule: measure(bench, rule, pair, held),
            )


def likelihoods(losses: dict[str, float]) -> dict[str, float]:
    """Return the likelihood of a token in per cent, from losses in nats."""
    return {task: 100 * float(np.exp(-loss)) for task, loss in losses.items()}


def table(out: Path) -> pd.DataFrame:
    """Return a row a rule and method: how many merges fail, and what they lose, means over the merges."""
    results = [json.loads(path.read_text()) for path in sorted(out.glob("merge-*.json"))]
    rows = []
    kind = operator.itemgetter("rule", "method")
    for (rule, method), group in itertools.groupby(sorted(results, key=kind), key=kind):
        of = list(group)
        merged, alone = ([likelihoods(result[key]) for result in of] for key in ("merged", "alone"))
        row = {"rule": rule, "method": TITLES[method], "merges": len(of)}
        row |= {f"fail at {tau:g}": round(merge_fail(merged, alone, tau) * len(of)) for tau in TAUS}
        row["mean drop, points"] = round(mean_post_merge_drop(merged, alone), 2)
        for task in TASKS:
            rise = [result["merged"][task] - result["alone"][task] for result in of]
            row[f"loss rises on {task}"] = f"{np.mean(rise):.3f} ({min(rise):.3f} to {max(rise):.3f})"
        row |= {f"KL, {text}": round(float(np.mean([r["kl"][text] for r in of])), 4) for text in of[0]["kl"]}
        rows.append(row)
    return pd.DataFrame(rows)


def main() -> None:
    """Merge and measure, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--to", type=Path)
    parser.add_argument("--method", nargs="+", default=["hiplora", "lora-mlp", "lora-all"])
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.command == "run":
        recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
        work(Bench(recipe, args.model, args.data, args.out, args.device), args.method, args.rate, args.seeds)
        return
    found = table(args.out)
    found.to_csv((args.to or args.out) / "merges.csv", index=False)
    print(found.to_string(index=False))


if __name__ == "__main__":
    main()
