"""Throughput of `hiplora eval` against lm-eval's own model, on the same items, side by side in one run.

    python benchmarks/evaluation.py [--items 16] [--rounds 3] [--data FOLDER] [--json FILE]

One task of each kind: letters (answers of one token), endings (answers of several), a last word, a number to be
written. Their items come from `--data`, or else are made of Python's own documentation. Each round scores a
task with both, in an order that alternates, at the same batch size; the ratio is the median over rounds of lm-
eval's time to ours.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

TASKS = ("mmlu", "hellaswag", "lambada", "gsm8k")
ENGINES = ("lm-eval", "hiplora")


def made_rows(count: int) -> dict[str, list[dict[str, Any]]]:
    """Make items of each kind from the language reference that comes with Python."""
    from pydoc_data.topics import topics

    words = " ".join(topics[name] for name in sorted(topics)).split()
    draw = random.Random(0)
    passages = [words[start : start + 90] for start in draw.sample(range(len(words) - 90), count)]
    endings = [" ".join(passage[60:90]) for passage in passages]
    choices = [[endings[(i + j) % count] for j in range(4)] for i in range(count)]
    return {
        "mmlu_test": [
            {
                "question": " ".join(p[:50]),
                "choices": [" ".join(p[50 + 5 * j : 55 + 5 * j]) for j in range(4)],
                "answer": 0,
            }
            for p in passages
        ],
        "hellaswag": [
            {"context": " ".join(p[:60]), "choices": choices[i], "answer": 0} for i, p in enumerate(passages)
        ],
        "lambada": [{"context": " ".join(p[:80]), "answer": p[80]} for p in passages],
        "gsm8k_test": [{"question": " ".join(p[:60]), "answer": f"#### {len(p[0])}"} for p in passages],
    }  # fmt: skip


def main() -> None:
    """Run the comparison, print it, and write JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.data:
        results = measure(args, args.data)
    else:
        with tempfile.TemporaryDirectory() as folder:
            for name, rows in made_rows(args.items).items():
                (Path(folder) / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            results = measure(args, Path(folder))
    for task, found in results.items():
        rates = ", ".join(f"{engine} {found['items_per_second'][engine]:.2f} items/s" for engine in ENGINES)
        print(
            f"{task}: {rates}; ratio {found['ratio']:.2f}; largest difference {found['largest_difference']:.1e}"
        )
    if args.json:
        from hiplora.files import write_atomic
        from hiplora.provenance import provenance

        setting = {"model": args.model, "items": args.items, "rounds": args.rounds, "batch_size": args.batch}
        setting["data"] = str(args.data.name) if args.data else "made of Python's documentation"
        record = {
            "benchmark": "evaluation",
            "setting": setting,
            "results": results,
            "provenance": provenance(),
        }
        write_atomic(args.json, json.dumps(record, indent=2) + "\n")
        print(f"wrote {args.json}")


def measure(args: argparse.Namespace, data: Path) -> dict[str, Any]:
    """Return, a task, each engine's speed, the ratio, and how far their likelihoods are apart (nats)."""
    from lm_eval.models.huggingface import HFLM

    from hiplora.evaluation.engine import Engine
    from hiplora.evaluation.lm import AnswerLM
    from hiplora.evaluation.suite import read_suite
    from hiplora.models import load

    model, tokenizer = load(args.model)
    lms = {
        "lm-eval": HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch),
        "hiplora": AnswerLM(model, tokenizer, args.batch),
    }
    results = {}
    for name in TASKS:
        engine = Engine(read_suite(name), data=data, limit=args.items)
        seconds: dict[str, list[float]] = {which: [] for which in ENGINES}
        answers: dict[str, list[Any]] = {}
        for number in range(args.rounds + 1):
            for which in ENGINES if number % 2 else ENGINES[::-1]:
                start = time.perf_counter()
                answers[which] = engine.responses(lms[which], name)
                if number:  # the first round warms up
                    seconds[which].append(time.perf_counter() - start)
        ratios = [theirs / ours for theirs, ours in zip(seconds["lm-eval"], seconds["hiplora"], strict=True)]
        results[name] = {
            "items_per_second": {
                which: args.items / statistics.median(found) for which, found in seconds.items()
            },
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "largest_difference": apart(answers["lm-eval"], answers["hiplora"]),
        }
    return results


def apart(theirs: list[Any], ours: list[Any]) -> float:
    """Return the largest difference of a likelihood; written answers must be the same."""
    worst = 0.0
    for one, other in zip(theirs, ours, strict=True):
        if isinstance(one, str):
            if one != other:
                raise SystemExit(f"the written answers differ: {one!r} and {other!r}")
        else:
            worst = max(worst, abs(one[0] - other[0]))
    return worst


if __name__ == "__main__":
    main()
