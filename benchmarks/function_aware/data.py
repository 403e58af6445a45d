"""The jobs of the experiment, the texts that drift is measured on, and those that a basis is calibrated on."""

from pathlib import Path
from typing import Any

from benchmarks import frontier
from benchmarks.frontier import fitting, read_rows, task_pairs

from hiplora.editing import Edit
from hiplora.evaluation import Encoded

CALIBRATION_ROW = 256


def job_rows(job: str, data: Path, tokenizer: Any, measure: dict[str, Any]) -> tuple[list[Encoded], list[Encoded]]:
    """Return the examples to train on and those to hold out, none longer than the recipe's `max_tokens`."""
    train, held = task_pairs(job, data)
    most = measure["max_tokens"]
    return (
        fitting(tokenizer, train, measure["train_rows"], most),
        fitting(tokenizer, held, measure["heldout_rows"], most),
    )


def edit_sets(data: Path, sets: int, per_set: int, neighbours: int) -> list[tuple[list[Edit], list[Edit]]]:
    """Return CounterFact edits in sets, each with the same edits asked of their neighbours, which must not change.

    Edits that share a subject are taken once; a neighbour's `old` is the true answer, `new` the edit's.
    """
    chosen: dict[str, dict[str, Any]] = {}
    for row in read_rows(data / "counterfact.jsonl.gz"):
        if len(row["neighborhood_prompts"]) == 10 and row["paraphrase_prompts"]:
            chosen.setdefault(row["subject"], row)
    rows = list(chosen.values())
    parts = [rows[first : first + per_set] for first in range(0, sets * per_set, per_set)]
    return [
        (
            [_edit(row, row["prompt"], row["target_true"]) for row in part],
            [
                _edit(row, *asked)
                for row in part
                for asked in list(zip(row["neighborhood_prompts"], row["neighborhood_answers"], strict=True))[
                    :neighbours
                ]
            ],
        )
        for part in parts
    ]


def _edit(row: dict[str, Any], prompt: str, old: str) -> Edit:
    new, paraphrase = row["target_new"].strip(), row["paraphrase_prompts"][0]
    return Edit(prompt, old.strip(), new, row["subject"], "Relation/Fact", paraphrase)


def drift_texts(data: Path) -> dict[str, str]:
    """Return the texts that no job trains on and no basis is calibrated on, by their names in these records."""
    texts = frontier.drift_texts(data)
    return {"prose": texts["wikitext"], "python code": texts["python"], "german": texts["german"]}


def calibration_text(source: str, data: Path) -> str:
    """Return a text to calibrate on: other articles than the drift text's, MBPP solutions, or the task's own rows."""
    if source == "prose":
        return "".join(row["text"] for row in read_rows(data / "wikitext2_raw_train_head.jsonl.gz"))
    if source == "code":
        return "\n\n".join(row["code"] for row in read_rows(data / "mbpp.jsonl.gz"))
    return "\n\n".join("".join(pair) for pair in task_pairs("gsm8k", data)[0])
