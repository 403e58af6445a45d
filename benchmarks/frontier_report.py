"""From the runs of `benchmarks.frontier` to records, the comparison at equal learning, abilities, and the figure.

Two methods are compared at the lowest held-out loss that both reach, seed by seed, each at the rate, step and scale of
the finished adapter that drifts least there. Between neighbours on a curve (steps of a run, or scales of its adapter)
the drift is interpolated, linear in the loss and logarithmic in the divergence; never beyond a curve's ends. The
interval, chosen before the runs, is Student's t over the seeds' log ratios; `p` is Holm-adjusted over the table's rows.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from hiplora.metrics.bootstrap import student_margin
from hiplora.study.protocols.claims import holm

REFERENCE = "hiplora"
MAIN = ("hiplora", "lora-all", "lora-mlp", "lora-mlp-kl")  # of the figure for the README
KEYS = ["task", "method", "rate", "seed"]
TITLES = {
    "hiplora": "HiP-LoRA",
    "hiplora-k128": "HiP-LoRA, k = 128",
    "hiplora-paper": "HiP-LoRA (paper)",
    "hiplora-retraction": "HiP-LoRA, retraction only",
    "hiplora-kl": "HiP-LoRA + KL",
    "hiplora-replay": "HiP-LoRA + replay",
    "hiplora-eaft": "HiP-LoRA + EAFT",
    "lora-all": "LoRA, all linear layers",
    "lora-mlp": "LoRA on the MLPs",
    "lora-attention": "LoRA on attention",
    "lora-mlp-kl": "LoRA on the MLPs + KL",
    "lora-mlp-replay": "LoRA on the MLPs + replay",
    "lora-mlp-eaft": "LoRA on the MLPs + EAFT",
    "oplora": "OPLoRA on the MLPs",
    "osf": "OSF on the MLPs",
    "pissa": "PiSSA on the MLPs",
}


def read_records(out: Path) -> pd.DataFrame:
    """Return the runs as one tidy table: task, method, rate, seed, step, scale, metric, value."""
    rows = []
    for path in sorted(out.glob("*-seed*.json")):
        result = json.loads(path.read_text())
        for point in result.get("points", ()):
            place = [result[key] for key in KEYS] + [point["step"], point["scale"]]
            rows.append([*place, "heldout_loss", point["heldout_loss"]])
            for metric in ("kl", "greedy_changed"):
                rows += [[*place, f"{metric}/{text}", value] for text, value in point[metric].items()]
    return pd.DataFrame(rows, columns=[*KEYS, "step", "scale", "metric", "value"])


def curves(points: pd.DataFrame) -> list[pd.DataFrame]:
    """Return a method's curves: of each run its steps, and its scales at the last step."""
    found = []
    for _, run in points.groupby("rate"):
        found.append(run[run["scale"] == 1].sort_values("step"))
        found.append(run[run["step"] == run["step"].max()].sort_values("scale"))
    return found


def drift_at(points: pd.DataFrame, loss: float, text: str) -> float:
    """Return the least drift at which one seed of a method has learned to `loss` or better; NaN if it never did."""
    candidates = points.loc[points["heldout_loss"] <= loss, text].tolist()
    for curve in curves(points):
        pairs = itertools.pairwise(zip(curve["heldout_loss"], curve[text], strict=True))
        for (one, low), (two, high) in pairs:
            if min(one, two) < loss < max(one, two):
                share = (one - loss) / (one - two)
                candidates.append(math.exp((1 - share) * math.log(low) + share * math.log(high)))
    return min(candidates, default=math.nan)


def at_equal_loss(records: pd.DataFrame) -> pd.DataFrame:
    """Return per task, rival and text how many times as far the rival drifts as HiP-LoRA, with its interval."""
    wide = records.pivot_table(index=[*KEYS, "step", "scale"], columns="metric", values="value").reset_index()
    texts = [column for column in wide if column.startswith("kl/")]
    rows: list[dict[str, Any]] = []
    for task, of_task in wide.groupby("task"):
        ours = of_task[of_task["method"] == REFERENCE]
        for method in [name for name in of_task["method"].unique() if name != REFERENCE]:
            theirs = of_task[of_task["method"] == method]
            seeds = sorted({*ours["seed"]} & {*theirs["seed"]})
            if not seeds:
                continue
            pairs = [(ours[ours["seed"] == seed], theirs[theirs["seed"] == seed]) for seed in seeds]
            losses = [max(one["heldout_loss"].min(), two["heldout_loss"].min()) for one, two in pairs]
            for text in texts:
                here = [drift_at(one, loss, text) for (one, _), loss in zip(pairs, losses, strict=True)]
                there = [drift_at(two, loss, text) for (_, two), loss in zip(pairs, losses, strict=True)]
                rows.append(
                    {
                        "task": task,
                        "rival": method,
                        "text": text.removeprefix("kl/"),
                        "heldout_loss": np.mean(losses),
                        "kl_hiplora": math.exp(np.mean(np.log(here))),
                        "kl_rival": math.exp(np.mean(np.log(there))),
                        **_ratio(np.log(there) - np.log(here)),
                    }
                )
    table = pd.DataFrame(rows)
    return table.assign(p=holm(table["p"])) if len(table) else table


def _ratio(logs: np.ndarray) -> dict[str, Any]:
    """Return the geometric mean of ratios with Student's interval over seeds; without one for a single seed."""
    found: dict[str, Any] = {"times_as_far": math.exp(logs.mean()), "seeds": len(logs)}
    found |= dict.fromkeys(("low", "high", "p"), math.nan)
    if len(logs) > 1:
        test = stats.ttest_1samp(logs, 0.0)
        low, high = test.confidence_interval()
        found |= {"low": math.exp(low), "high": math.exp(high), "p": float(test.pvalue)}
    return found


def abilities(out: Path) -> pd.DataFrame:
    """Return per task, method and benchmark the mean changes from the base, paired by item, with t intervals.

    Of accuracy and log-likelihood, and without their signs: the share of items with another outcome, and how far the
    log-likelihood moved.
    """
    base = json.loads((out / "base-abilities.json").read_text())["abilities"]
    rows = []
    for path in sorted(out.glob("*-seed*-abilities.json")):
        result = json.loads(path.read_text())
        for benchmark, scores in result["abilities"].items():
            solved, likelihood = (
                np.array(scores[metric]) - np.array(base[benchmark][metric])
                for metric in ("correct", "log_likelihood")
            )
            changes = {"correct": 100.0 * solved, "other": 100.0 * abs(solved), "log_likelihood": likelihood}
            changes["moved"] = abs(likelihood)
            rows += [[result["task"], result["method"], benchmark, *change] for change in changes.items()]
    table = pd.DataFrame(rows, columns=["task", "method", "benchmark", "metric", "change"])
    kept = ["task", "method", "benchmark", "metric"]
    grouped = table.groupby(kept)["change"].agg(lambda seeds: np.mean(list(seeds), axis=0))
    half = grouped.map(lambda items: student_margin(np.std(items, ddof=1), len(items)))
    mean = grouped.map(np.mean)
    found = pd.DataFrame({"change": mean, "low": mean - half, "high": mean + half, "items": grouped.map(len)})
    return found.reset_index()


def changed_tokens(records: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Return by KL and text how many per cent of next tokens are chosen differently: the median at about that KL."""
    columns = records["metric"].str.split("/", expand=True)
    named = records.assign(metric=columns[0], text=columns[1])
    points = named.pivot_table(index=[*KEYS, "step", "scale", "text"], columns="metric", values="value").reset_index()
    near = {str(kl): points[points["kl"].between(0.8 * kl, 1.25 * kl)] for kl in (0.01, 0.1)}
    return {
        kl: (100 * rows.groupby("text")["greedy_changed"].median()).round(2).to_dict() for kl, rows in near.items()
    }


def titled(methods: pd.Series) -> pd.Series:
    """Return methods by the names that readers see."""
    return methods.map(lambda name: TITLES.get(name, name))


def figure(records: pd.DataFrame, task: str) -> Any:
    """Return held-out loss against drift on prose, a line a method: the means over its seeds at each step."""
    from hiplora.reporting import plots

    rows = records[(records["task"] == task) & (records["scale"] == 1)]
    wide = rows.pivot_table(index=["method", "step"], columns="metric", values="value", sort=False).reset_index()
    axes = {"xlabel": "Held-out loss, nats per token", "ylabel": "KL on WikiText, nats per token", "logy": True}
    return plots.lines(wide.assign(method=titled(wide["method"])), "heldout_loss", "kl/wikitext", "method", **axes)


def shown(equal: pd.DataFrame) -> pd.DataFrame:
    """Return the comparison at equal loss as the documentation shows it."""
    from hiplora.reporting import interval

    ratios = equal[["times_as_far", "low", "high"]].itertuples(index=False)
    return pd.DataFrame(
        {
            "task": equal["task"],
            "rival": titled(equal["rival"]),
            "drift on": equal["text"],
            "held-out loss": equal["heldout_loss"].map("{:.3f}".format),
            "KL, HiP-LoRA": equal["kl_hiplora"].map("{:.4f}".format),
            "KL, rival": equal["kl_rival"].map("{:.4f}".format),
            "times as far": [interval(*row, digits=1) for row in ratios],
            "seeds": equal["seeds"],
        }
    )


def shown_abilities(found: pd.DataFrame) -> pd.DataFrame:
    """Return the changes of abilities as the documentation shows them, a column a benchmark."""
    from hiplora.reporting import interval

    units = {
        "correct": ("accuracy, pp", 1),
        "other": ("items with another outcome, %", 1),
        "log_likelihood": ("log-likelihood, nats per token", 3),
        "moved": ("… whatever the sign", 3),
    }
    told = [interval(row.change, row.low, row.high, units[row.metric][1]) for row in found.itertuples()]
    names = {"method": titled(found["method"]), "metric": [units[metric][0] for metric in found["metric"]]}
    wide = found.assign(told=told, **names).pivot(
        index=["task", "metric", "method"], columns="benchmark", values="told"
    )
    return wide.rename_axis(columns=None).reset_index()


def report(out: Path, to: Path) -> None:
    """Write records, tables and figures of what is done."""
    from hiplora.reporting.plots import save_figure

    to.mkdir(parents=True, exist_ok=True)
    records = read_records(out)
    records.to_csv(to / "records.csv.gz", index=False, float_format="%.6g", compression={"method": "gzip", "mtime": 0})
    equal = at_equal_loss(records)
    shown(equal).to_csv(to / "equal-loss.csv", index=False)
    (to / "equal-loss.json").write_text(equal.to_json(orient="records", indent=1) + "\n")
    (to / "tokens.json").write_text(json.dumps(changed_tokens(records), indent=1) + "\n")
    if (out / "base-abilities.json").exists():
        found = abilities(out)
        shown_abilities(found).to_csv(to / "abilities.csv", index=False)
        (to / "abilities.json").write_text(found.to_json(orient="records", indent=1) + "\n")
    for task in records["task"].unique():
        save_figure(figure(records, task), to / f"frontier-{task}")
    save_figure(figure(records[records["method"].isin(MAIN)], "gsm8k"), to / "frontier-gsm8k-main")
    print(f"{records.groupby(KEYS).ngroups} runs in {to}")
