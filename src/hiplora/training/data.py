"""Training data in the usual shapes, as prompts and responses.

An `Example` is text. What becomes of it as tokens, and which of them are learned, is `encoding`'s business.
"""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hiplora.errors import DataError, first_line
from hiplora.provenance import file_sha256
from hiplora.recipes import DataSettings
from hiplora.recipes.rows import Row, read_rows
from hiplora.recipes.shapes import check_rows, completion_field, detect_shape
from hiplora.recipes.wording import (
    direct_question,
    final_number,
    lettered,
    letters,
    step_by_step,
    with_hint,
)

# The project's Alpaca-style wording: a task, perhaps something to do it to, and where the answer goes.
TASK = "Carry out the task below.\n\n## Task\n{instruction}\n\n"
MATERIAL = "## Material\n{material}\n\n"
ANSWER = "## Answer\n"

DEFAULT_TEMPLATES = {
    "alpaca": "instruction",
    "question_answer": "instruction",
    "query_response": "instruction",
    "prompt_completion": "verbatim",
    "multiple_choice": "direct",
}
WORDED = {
    "direct": ("multiple_choice", "question_answer"),
    "step_by_step": ("question_answer", "query_response"),
}  # template → the shapes that it applies to, where those are not all
SPLIT_SEED = 0  # held-out rows depend on the data alone, so that runs with several seeds share them


@dataclass(frozen=True)
class Example:
    """One thing to learn: the response to a prompt.

    `prompt` is empty for plain text, all of which is learned; `learn_prompt` says that the prompt is learned too. A
    conversation keeps its `messages` ({"role",
    "content"}), goes through the tokenizer's chat template, and every assistant message in it is learned; its
    `prompt` and `response` are then the text before the last assistant message, and that message.
    """

    prompt: str
    response: str
    messages: tuple[Mapping[str, str], ...] = ()
    learn_prompt: bool = False

    @property
    def is_text(self) -> bool:
        """Whether this is plain text, without a prompt."""
        return not self.prompt and not self.messages


@dataclass(frozen=True)
class TrainingData:
    """The examples of a recipe, and the hashes of what they were read from."""

    train: list[Example]
    held_out: list[Example]
    sources: dict[str, dict[str, Any]]
    shape: str


def instruction_prompt(instruction: str, material: str = "") -> str:
    """Word a task in the project's Alpaca style; the response follows the returned text directly."""
    middle = MATERIAL.format(material=material.strip()) if material.strip() else ""
    return TASK.format(instruction=instruction.strip()) + middle + ANSWER


def load_examples(
    source: str | Path, format: str = "auto", template: str | None = None, limit: int | None = None
) -> list[Example]:
    """Read a JSONL, JSON or parquet file (JSON may be gzipped) into examples.

    Args:
        source: the file.
        format: the rows' shape, or "auto" to read it off the first row.
        template: how prompts are worded, as `DataSettings.template`.
        limit: take at most this many rows, the first ones.

    Raises:
        DataError: the file or some rows cannot be used; each is named with its line and what it lacks.
    """
    return _examples(check_rows(read_rows(Path(source)), format, source), template, limit)


def rows_as_examples(rows: Iterable[Row], name: str) -> list[Example]:
    """Return (place, row) pairs of any of the usual shapes as examples; errors name the place."""
    return _examples(check_rows(rows, "auto", name), None, None)


def load_data(data: DataSettings) -> TrainingData:
    """Read all that a recipe trains and measures on, and split it.

    Raises:
        DataError: as `load_examples`; or the held-out share leaves no row to train on.
    """
    rows, name = (_hub_rows(data), data.hub) if data.hub else (read_rows(Path(data.path or "")), data.path)
    shape, values = check_rows(rows, data.format, name or "")
    kept = _short_enough(values, shape, data.max_characters, name or "")
    train = _examples((shape, kept), data.template, data.limit)
    held_out: list[Example] = []
    if data.held_out is not None:
        held_out = load_examples(data.held_out, data.format, data.template)
    elif data.held_out_fraction is not None:
        train, held_out = _split(train, data.held_out_fraction, name or "")
    held_out = held_out[: data.held_out_limit]
    if data.learn_prompt:
        train, held_out = _prompts_learned(train, name or ""), _prompts_learned(held_out, name or "")
    sources = {"train": _source(data, data.path, len(train))}
    if data.max_characters is not None:
        sources["train"]["too_long"] = len(values) - len(kept)
    if held_out:
        sources["held_out"] = _source(data, data.held_out or data.path, len(held_out))
    return TrainingData(train, held_out, sources, shape)


def _short_enough(rows: list[Any], shape: str, limit: int | None, name: str) -> list[Any]:
    """Return the rows that are no longer than `limit` characters, a question's and its answer's with a space between.

    Raises:
        DataError: there are none, or the rows are conversations.
    """
    if limit is None:
        return rows
    if shape == "messages":
        raise DataError(f"{name}: data.max_characters does not apply to conversations; remove it")
    kept = [row for row in rows if len(" ".join(filter(None, _parts(row, shape)))) <= limit]
    if not kept:
        raise DataError(
            f"{name}: all {len(rows)} rows have more than {limit} characters (data.max_characters)"
        )
    return kept


def _prompts_learned(examples: list[Example], name: str) -> list[Example]:
    if any(example.messages for example in examples):
        raise DataError(f"{name}: data.learn_prompt does not apply to conversations; remove it")
    return [replace(example, learn_prompt=True) for example in examples]


def _examples(checked: tuple[str, list[Any]], template: str | None, limit: int | None) -> list[Example]:
    shape, rows = checked
    if template is not None and shape not in DEFAULT_TEMPLATES:
        raise DataError(f"data.template: {template} does not apply to {shape} rows; remove it")
    if shape not in WORDED.get(template or "", (shape,)):
        fitting = " and ".join(WORDED[template or ""])
        raise DataError(f"data.template: {template} applies to {fitting} rows, not to {shape}; remove it")
    wording = template or DEFAULT_TEMPLATES.get(shape, "")
    return [_example(row, shape, wording) for row in rows[:limit]]


def _example(row: Mapping[str, Any], shape: str, wording: str) -> Example:
    if shape == "text":
        return Example("", row["text"])
    if shape == "messages":
        return _conversation(
            [{"role": message["role"], "content": message["content"]} for message in row["messages"]]
        )
    if wording == "direct":
        question, answer = (
            (direct_question(row), final_number(row)) if shape == "question_answer" else _choice(row)
        )
        return Example(question, f" {answer}")
    task, material, response = _parts(row, shape)
    if wording == "step_by_step":
        return Example(step_by_step(task), response)
    if wording == "chat":
        asked = f"{task}\n\n{material}" if material.strip() else task
        return _conversation([{"role": "user", "content": asked}, {"role": "assistant", "content": response}])
    if wording == "verbatim":
        return Example(f"{task}\n\n{material}" if material.strip() else task, response)
    return Example(instruction_prompt(task, material), response)


def _parts(row: Mapping[str, Any], shape: str) -> tuple[str, str, str]:
    if shape == "alpaca":
        return row["instruction"], row.get("input") or "", row["output"]
    if shape == "question_answer":
        return row["question"], "", row["answer"]
    if shape == "query_response":
        return row["query"], "", row["response"]
    if shape == "text":
        return row["text"], "", ""
    if shape == "multiple_choice":
        question, answer = _choice(row)
        return question, "", answer
    return row["prompt"], "", row[completion_field(row)]


def _choice(row: Mapping[str, Any]) -> tuple[str, str]:
    """A multiple-choice question with lettered choices, and the right letter."""
    return lettered(row), letters(row)[row["answer"]]


def _conversation(messages: Sequence[Mapping[str, str]]) -> Example:
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    before = "\n\n".join(message["content"] for message in messages[:last])
    return Example(before, messages[last]["content"], tuple(messages))


def _split(examples: list[Example], fraction: float, name: str) -> tuple[list[Example], list[Example]]:
    count = max(1, round(fraction * len(examples)))
    if count >= len(examples):
        raise DataError(
            f"{name}: data.held_out_fraction {fraction} of {len(examples)} rows leaves none to train on; "
            "lower it, or give more rows"
        )
    kept_back = set(random.Random(SPLIT_SEED).sample(range(len(examples)), count))
    train = [example for index, example in enumerate(examples) if index not in kept_back]
    return train, [examples[index] for index in sorted(kept_back)]


def _source(data: DataSettings, path: str | None, rows: int) -> dict[str, Any]:
    if path is None:
        return {"hub": data.hub, "config": data.hub_config, "split": data.split or "train", "rows": rows}
    return {"file": Path(path).name, "sha256": file_sha256(path), "rows": rows}


def _hub_rows(data: DataSettings) -> Iterator[Row]:
    """Rows of a hub data set; datasets' own cache makes a second read cheap and offline.

    Of multiple choice a hint stands before the question, and questions about a picture are left out.
    """
    from datasets import Image, load_dataset
    from datasets.exceptions import DatasetsError

    try:
        rows = load_dataset(data.hub, data.hub_config, split=data.split or "train")
    except (DatasetsError, OSError, ValueError) as error:
        raise DataError(
            f"data.hub: {data.hub} cannot be loaded ({first_line(error)}); check the name, `split` and `hub_config`, "
            "or give a file as data.path"
        ) from error
    if isinstance(rows.features.get("image"), Image):  # pictures are not looked at
        rows = rows.cast_column("image", Image(decode=False))
    for number, row in enumerate(rows, start=1):
        readable = with_hint(row) if detect_shape(row) == "multiple_choice" else row
        if readable is not None:
            yield f"row {number}", readable
