"""`hiplora eval`'s scoring against lm-eval's own, on the same items of the same tasks.

    python benchmarks/scoring.py --data FOLDER [--tasks hellaswag,lambada,gsm8k] [--items 16] [--rounds 3] [--json FILE]

Both score one loaded model, in batches of 8, and load their tasks and rows before the time starts. lm-eval is its
`HFLM` as it comes. hiplora also scores the right answers where the model writes its own. FOLDER has the tasks' files
(docs/reference/tasks.md). Ratios above 1 mean that hiplora is faster; each contender's turn comes first once a round.
"""

import logging
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from side_by_side import options, timed, turns, write

from hiplora.evaluation.engine import Engine
from hiplora.evaluation.evaluate import EvalSettings
from hiplora.evaluation.mounting import load_model
from hiplora.evaluation.suite import PREFIX, TASKS, read_suite

MODEL, BATCH = "smollm2-135m", 8


def of_lm_eval(lm: HFLM, tasks: Mapping[str, Any], samples: dict[str, list[int]]) -> dict[str, list[dict[str, Any]]]:
    """Return each task's metrics, item by item, by lm-eval alone."""
    results = evaluate(lm, {"tasks": dict(tasks), "groups": {}}, samples=samples, bootstrap_iters=0)
    return {name: sorted(rows, key=lambda row: row["doc_id"]) for name, rows in results["samples"].items()}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", default="hellaswag,lambada,gsm8k")
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    model, tokenizer = load_model(MODEL)
    settings = EvalSettings(suite=arguments.tasks, data=arguments.data, limit=arguments.items)
    engine = Engine(read_suite(settings.suite, settings.folder), settings, tokenizer)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"data": str(arguments.data)})
    lm, record = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH), {}
    for name, about in engine.describe().items():
        key = f"{PREFIX}{name}"
        tasks, samples = manager.load([key])["tasks"], {key: about["items"]}
        contenders = {
            "lm-eval": lambda tasks=tasks, samples=samples, key=key: of_lm_eval(lm, tasks, samples)[key],
            "hiplora": lambda name=name: engine.score(model, tokenizer, BATCH, [name])[name],
        }
        seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
        for _, contender in turns([*contenders], arguments.rounds):
            scored, took = timed(contenders[contender])
            seconds[contender].append(took["seconds"])
            if contender == "hiplora":
                ours = scored
            else:
                theirs = scored
        scores = [100.0 * float(row[ours.metric]) for row in theirs]
        ratios = [plain / own for plain, own in zip(seconds["lm-eval"], seconds["hiplora"], strict=True)]
        record[name] = {"seconds": seconds, "ratio": statistics.median(ratios), "ratios": ratios}
        record[name]["equal_scores"] = scores == ours.score
        print(f"{name}: {record[name]['ratio']:.2f} times as fast; equal scores: {record[name]['equal_scores']}")
    setting = {"model": MODEL, "items": arguments.items, "batch_size": BATCH, "rounds": arguments.rounds}
    write(arguments.json, {"benchmark": "evaluation", "setting": setting, "tasks": record})


if __name__ == "__main__":
    main()
