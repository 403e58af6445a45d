"""Collect the checks of merges into docs/results/merge-check: the records, a summary, a figure.

    python -m benchmarks.merge_check.report --checks FOLDER

`--checks` holds a folder check-METHOD for each training method, as `hiplora merge-check` wrote it.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from hiplora.files import write_atomic
from hiplora.metrics import retain
from hiplora.reporting.canvas import Panel, Plate, axes, plate_files
from hiplora.reporting.palette import LOOKS

OUT = Path(__file__).parents[2] / "docs" / "results" / "merge-check"
NAMES = {
    "lora": "LoRA, attention",
    "lora-mlp": "LoRA, MLP",
    "hiplora-paper": "HiP-LoRA, the paper's, attention",
    "hiplora": "HiP-LoRA, function-aware, MLP",
}
_LOOK = {"lora": LOOKS[1], "lora-mlp": LOOKS[4], "hiplora-paper": LOOKS[3], "hiplora": LOOKS[0]}
TASKS = {"mmlu": "MMLU", "scienceqa": "ScienceQA", "gsm8k": "GSM8K", "humaneval": "HumanEval"}
RULES = {"addition": "All four added", "ties": "All four by TIES"}


def main() -> None:
    """Write the records, the summary and the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    summary = {method: summarise(record) for method, record in records.items()}
    summary = plain(summary)
    origin = next(iter(records.values()))["provenance"]
    write_atomic(
        OUT / "summary.json", json.dumps({"methods": summary, "provenance": origin}, indent=1) + "\n"
    )
    write_atomic(OUT / "likelihoods.svg", plate_files(figure(summary))["svg"])
    print(f"{len(records)} methods in {OUT}")


def summarise(record: dict[str, Any]) -> dict[str, Any]:
    """Return what the pages quote: each run's means, each rule's verdicts, Retain."""
    means = {
        run: {task: {form: found[form]["estimate"] for form in ("score", "likelihood") if form in found}
              for task, found in tasks.items()}
        for run, tasks in record["runs"].items()
    }  # fmt: skip
    retained = {
        form: {
            domain: retain(_form(means["base"], form), _form(means[domain], form), domain)
            for domain in record["adapters"]
        }
        for form in ("score", "likelihood")
    }
    return {
        "means": means,
        "verdicts": record["verdicts"],
        "retain": {
            form: {**each, "mean": statistics.fmean(each.values())} for form, each in retained.items()
        },
    }


def plain(value: Any) -> Any:
    """Return a JSON value without negative zeros."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value + 0.0 if isinstance(value, float) else value


def _form(tasks: dict[str, dict[str, float]], form: str) -> dict[str, float]:
    return {task: found[form] for task, found in tasks.items()}


def figure(summary: dict[str, Any]) -> Plate:
    """Return the likelihoods before and after, a panel a rule."""
    shown = [method for method in NAMES if method in summary]
    panels = [_panel(rule, title, summary, shown) for rule, title in RULES.items()]
    legend = {NAMES[method]: _LOOK[method] for method in shown}
    return Plate(
        "likelihoods", "Four adapters merged: each task's likelihood before and after", "", panels, legend
    )


def _panel(rule: str, title: str, summary: dict[str, Any], shown: list[str]) -> Panel:
    def draw(container: Any) -> None:
        ax = axes(container, "likelihood of the right answer, %", "", "x")
        place, ticks = 0.0, []
        for task in TASKS:
            first = place
            for method in shown:
                row, look = summary[method]["verdicts"][rule]["likelihood"]["tasks"][task], _LOOK[method]
                ax.plot([row["before"], row["after"]], [place, place], color=look.colour, linewidth=1.6)
                ax.plot(
                    [row["before"]], [place], "o", color=look.colour, markersize=6, markerfacecolor="white"
                )
                ax.plot([row["after"]], [place], look.marker, color=look.colour, markersize=7)
                place += 1
            ax.plot([summary[shown[0]]["means"]["base"][task]["likelihood"]] * 2, [first - 0.5, place - 0.5],
                    color="#5a6373", linewidth=1.2, dashes=(2, 2))  # fmt: skip
            ticks.append((first + place - 1) / 2)
            place += 1
        ax.set_yticks(ticks, list(TASKS.values()))
        ax.set_ylim(place - 1, -1)
        ax.set_xlim(0, 52)  # the same in both panels

    words = "hollow: the task's own adapter alone; filled: the merge; dashed: the base model; further right is better"
    return Panel(f"likelihood-{rule}", title, words, draw, 460, 420)


if __name__ == "__main__":
    main()
