"""Collect the checks of merges into docs/results/merge-check: the records, a summary, a figure.

    python -m benchmarks.merge_check.report --checks FOLDER

`--checks` holds a folder check-METHOD for each training method, as `hiplora merge-check` wrote it.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from hiplora.files import write_atomic
from hiplora.metrics import retain
from hiplora.reporting import plots
from hiplora.reporting.plots import save_figure

OUT = Path(__file__).parents[2] / "docs" / "results" / "merge-check"
NAMES = {"lora": "LoRA", "lora-mlp": "LoRA on the MLPs", "hiplora-paper": "HiP-LoRA (paper)", "hiplora": "HiP-LoRA"}
TASKS = {"mmlu": "MMLU", "scienceqa": "ScienceQA", "gsm8k": "GSM8K", "humaneval": "HumanEval"}
FORMS = ("score", "likelihood")
RULES = {"addition": "All four added", "ties": "All four by TIES"}


def main() -> None:
    """Write the records, the summary and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checks", type=Path, required=True)
    args = parser.parse_args()
    records = {}
    for method in NAMES:
        path = args.checks / f"check-{method}" / "merge-check.json"
        if path.is_file():
            record = json.loads(path.read_text())
            record["model"] = Path(record["model"]).name
            record["adapters"] = {task: Path(folder).name for task, folder in record["adapters"].items()}
            records[method] = record
            write_atomic(OUT / f"{method}.json", json.dumps(record, separators=(",", ":")) + "\n")
    summary = plain({method: summarise(record) for method, record in records.items()})
    origin = next(iter(records.values()))["provenance"]
    write_atomic(OUT / "summary.json", json.dumps({"methods": summary, "provenance": origin}, indent=1) + "\n")
    save_figure(figure(summary), OUT / "likelihoods")
    print(f"{len(records)} methods in {OUT}")


def summarise(record: dict[str, Any]) -> dict[str, Any]:
    """Return what the pages quote: each run's means, each rule's verdicts, Retain."""
    means: dict[str, Any] = {
        run: {
            task: {form: found[form]["estimate"] for form in FORMS if form in found} for task, found in tasks.items()
        }
        for run, tasks in record["runs"].items()
    }
    retained = {}
    for form in FORMS:
        base, *alone = (
            {task: found[form] for task, found in means[run].items()} for run in ("base", *record["adapters"])
        )
        each = {name: retain(base, one, name) for name, one in zip(record["adapters"], alone, strict=True)}
        retained[form] = {**each, "mean": statistics.fmean(each.values())}
    return {"means": means, "verdicts": record["verdicts"], "retain": retained}


def plain(value: Any) -> Any:
    """Return a JSON value without negative zeros."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value + 0.0 if isinstance(value, float) else value


def figure(summary: dict[str, Any]) -> Figure:
    """Draw each task's likelihood with its own adapter and after the merge, a panel a rule."""
    with plots.styled():
        shown = Figure(figsize=(7.4, 7.5))
        for (rule, title), ax in zip(RULES.items(), shown.subplots(1, 2, sharex=True, sharey=True), strict=True):
            judged = {NAMES[key]: found["verdicts"][rule]["likelihood"]["tasks"] for key, found in summary.items()}
            rows = {
                f"{task}, {name}": {method: tasks[key][stage] for method, tasks in judged.items()}
                for key, task in TASKS.items()
                for stage, name in (("before", "alone"), ("after", "merged"))
            }
            colors = [plots.look(name)["color"] for name in judged]
            pd.DataFrame(rows).T.plot.barh(ax=ax, title=title, color=colors, legend=False)
            ax.set_xlabel("likelihood of the right answer, %")
        ax.invert_yaxis()
        shown.legend(*ax.get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return shown


if __name__ == "__main__":
    main()
