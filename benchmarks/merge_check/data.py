"""Rows to train the four adapters on, worded as the evaluation's tasks word their questions.

    python -m benchmarks.merge_check.data --data FOLDER --out FOLDER

`--data` holds the gzipped JSON lines `alpaca`, `scienceqa_train`, `gsm8k_train` and `codealpaca`. Answers are
direct: the letter of the choice, or the number after `####`. Rows longer than `MAX_CHARACTERS` are left out,
the rest is shuffled.
"""

import argparse
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hiplora.files import write_atomic

MAX_CHARACTERS = 700
ROWS = 1000
Row = dict[str, Any]


def instruction(row: Row) -> Row:
    """An Alpaca row as it is: the trainer words it."""
    return {key: row[key] for key in ("instruction", "input", "output")}


def science(row: Row) -> Row:
    """A multiple-choice question, answered by its letter."""
    choices = "".join(f"{chr(65 + index)}. {choice}\n" for index, choice in enumerate(row["choices"]))
    return {
        "prompt": f"Question: {row['question']}\n{choices}Answer:",
        "completion": f" {chr(65 + row['answer'])}",
    }


def mathematics(row: Row) -> Row:
    """A GSM8K question, answered by its number alone."""
    number = row["answer"].rpartition("####")[2].strip().replace(",", "")
    return {"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {number}"}


DOMAINS: dict[str, tuple[str, Callable[[Row], Row]]] = {
    "instructions": ("alpaca.jsonl.gz", instruction),
    "science": ("scienceqa_train.jsonl.gz", science),
    "gsm8k": ("gsm8k_train.jsonl.gz", mathematics),
    "code": ("codealpaca.jsonl.gz", instruction),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    for domain, (file, make) in DOMAINS.items():
        lines = gzip.decompress((args.data / file).read_bytes()).decode().strip().split("\n")
        rows = [make(json.loads(line)) for line in lines]
        kept = [row for row in rows if all(row.get(key, "x").strip() for key in ("output", "completion"))]
        kept = [row for row in kept if sum(map(len, row.values())) <= MAX_CHARACTERS]
        random.Random(0).shuffle(kept)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept[:ROWS])
        write_atomic(args.out / f"{domain}.jsonl", text)


if __name__ == "__main__":
    main()
