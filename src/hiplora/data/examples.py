"""Training data as prompts and responses: the `data` block of a recipe, and the examples that it stands for."""

import itertools
import json
import os
import random
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from hiplora.data.prompts import direct_question, final_number, instruction_prompt, lettered, letters, step_by_step
from hiplora.data.rows import FORMATS, Row, check_rows, hub_rows, read_rows
from hiplora.errors import DataError
from hiplora.provenance import file_sha256

# Row format -> default template; other formats take none.
TEMPLATES = {
    "alpaca": "instruction",
    "question_answer": "instruction",
    "query_response": "instruction",
    "prompt_completion": "verbatim",
    "multiple_choice": "direct",
}
# Template -> the formats that it applies to, where those are not all.
RESTRICTED = {"direct": ("multiple_choice", "question_answer"), "step_by_step": ("question_answer", "query_response")}
SPLIT_SEED = 0  # held-out rows depend on the data alone, so that runs with several seeds share them

PathText = Annotated[str, BeforeValidator(lambda value: os.fspath(value) if isinstance(value, os.PathLike) else value)]


class Block(BaseModel):
    """Base of every recipe block: unknown fields are errors, values are not coerced, nothing changes."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class DataSettings(Block):
    """What to train on: a file (JSON lines, JSON, parquet, CSV or text) or a data set on the hub."""

    path: PathText | None = Field(default=None, min_length=1)
    """File with the training rows: .jsonl, .json (both may be gzipped), .parquet, .csv or .txt. In a recipe, relative
    to the recipe's folder; with --set, to the current folder."""
    mix: dict[PathText, Annotated[float, Field(gt=0)]] = Field(default={})
    """Further files → how often an epoch has each row: 2 twice, 0.25 a random quarter once; none are held out."""
    hub: str | None = Field(default=None, min_length=1)
    """Data set on the Hugging Face hub, instead of `path`."""
    hub_config: str | None = None
    """Configuration (subset) of the hub data set."""
    split: str | None = Field(default=None, min_length=1)
    """Split of the hub data set, `train` if empty."""
    format: Literal[
        "auto", "alpaca", "prompt_completion", "question_answer", "query_response", "multiple_choice",
        "messages", "text",
    ] = "auto"  # fmt: skip
    """Format of a row. `alpaca`: instruction, input (optional), output. `prompt_completion`: prompt and completion (or
    response). `question_answer`: question and answer. `query_response`: query and response. `multiple_choice`:
    question, choices and the index of the right one as answer. These three may have a context. `messages`: a list of
    {role, content}, with tools and tool_calls; a system message may stand apart, and ShareGPT's conversations are read
    too. `text`: plain text. `auto` reads it off the first row."""
    template: Literal["auto", "instruction", "verbatim", "direct", "step_by_step", "chat"] | None = None
    """How a prompt is worded. `instruction`: Alpaca style (default for alpaca, question_answer and query_response
    rows). `verbatim`: the prompt as it is (default for prompt_completion). `direct`: as the evaluation tasks do,
    answered by the letter or the final number alone (default for multiple_choice). `step_by_step`: answered by the
    derivation, as in the task gsm8k_solution. `chat`: through the tokenizer's chat template. `auto`: `chat` instead of
    `instruction` where there is such a template. Not for messages and text rows."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be used, and count them."""
    max_characters: int | None = Field(default=None, ge=1)
    """Leave out rows whose question and answer together have more characters."""
    limit: int | None = Field(default=None, ge=1)
    """Use at most this many rows, the first that are not left out."""
    learn_prompt: bool = False
    """Learn the tokens of prompts as well."""
    held_out: PathText | None = Field(default=None, min_length=1)
    """File with rows to measure the loss on before and after training."""
    held_out_fraction: float | None = Field(default=None, gt=0, lt=1)
    """Instead of `held_out`: hold back this share of the rows. Which rows depends on the data alone, not on `seed`.
    Rows that repeat a held-out row are not trained on."""
    held_out_limit: int | None = Field(default=None, ge=1)
    """Measure on at most this many held-out rows."""

    @model_validator(mode="after")
    def _check(self) -> "DataSettings":
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either `path` (a file) or `hub` (a data set on the hub)")
        for name in ("split", "hub_config"):
            if self.hub is None and getattr(self, name) is not None:
                raise ValueError(f"`{name}` applies to `hub` only; remove it")
        if self.held_out is not None and self.held_out_fraction is not None:
            raise ValueError("give either `held_out` (a file) or `held_out_fraction` (a share of the rows)")
        if self.held_out_limit is not None and not self.has_held_out:
            raise ValueError("`held_out_limit` needs `held_out` or `held_out_fraction`")
        if self.template not in (None, "auto") and self.format in ("messages", "text"):
            raise ValueError(f"`template` does not apply to {self.format} rows; remove it")
        if self.learn_prompt and (self.template == "chat" or self.format == "messages"):
            raise ValueError("`learn_prompt` does not apply to conversations; remove it")
        return self

    @property
    def has_held_out(self) -> bool:
        """Whether rows are held out."""
        return self.held_out is not None or self.held_out_fraction is not None


@dataclass(frozen=True)
class Example:
    """A prompt and the response to learn.

    Plain text has an empty prompt and is learned whole. Of a conversation's `messages`, which go through the chat
    template with its `tools`, the assistant's from the index `learn_from` on are learned, but those of `weight` 0;
    `prompt` and `response` are the text before the last of them, and that message.
    """

    prompt: str
    response: str
    messages: tuple[Mapping[str, Any], ...] = ()
    learn_prompt: bool = False
    tools: tuple[Mapping[str, Any], ...] = ()
    learn_from: int = 0
    place: str = field(default="", compare=False)  # the row that it comes from

    @property
    def whole(self) -> str:
        """All of its text."""
        if self.messages:
            return "\n\n".join(message["content"] for message in self.messages)
        return self.prompt + self.response


@dataclass(frozen=True)
class TrainingData:
    """The examples of a recipe, the hashes of the files that they were read from, and notes on rows left out."""

    train: list[Example]
    held_out: list[Example]
    sources: dict[str, dict[str, Any]]
    notes: tuple[str, ...] = ()


def load_examples(
    source: str | Path, format: str = "auto", template: str | None = None, limit: int | None = None
) -> list[Example]:
    """Read the first `limit` rows of a data file as examples; DataError names each row that lacks a field."""
    return as_examples(*check_rows(read_rows(Path(source)), format, source), template)[:limit]


def load_data(data: DataSettings, chat: bool = False) -> TrainingData:
    """Read the rows that a recipe trains and measures on, and split them; `chat` allows template `auto` to be `chat`.

    Raises DataError if rows cannot be used, or none is left to train on.
    """
    name = data.hub or data.path or ""
    bad: list[str] | None = [] if data.skip_bad_rows else None

    def read(path: str, format: str) -> tuple[str, list[Row]]:
        return check_rows(read_rows(Path(path), bad), format, path, bad)

    if data.hub is not None:
        format, rows = check_rows(hub_rows(name, data.hub_config, data.split or "train"), data.format, name, bad)
    else:
        format, rows = read(name, data.format)
    short = rows if data.max_characters is None else _short_enough(rows, format, data.max_characters, name)
    train, held_out = as_examples(format, short[: data.limit], data.template, chat), []
    unused = _unused_fields(short, train, FORMATS[format].model_fields.keys())
    if data.held_out is not None:
        held_out = as_examples(*read(data.held_out, format), data.template, chat)
    elif data.held_out_fraction is not None:
        train, held_out = _split(train, data.held_out_fraction, name)
    sources: dict[str, dict[str, Any]] = {"train": {}}
    for path, weight in data.mix.items():
        added = as_examples(*read(path, "auto"), data.template, chat)
        repeats, rest = divmod(weight * len(added), len(added))
        sample = random.Random(SPLIT_SEED).sample(added, round(rest))
        if not (repeats or sample):
            what = f"data.mix: {weight} of the {len(added)} rows of {path} is no row"
            raise DataError(f"{what}; raise the number, or remove the file")
        train += added * int(repeats) + sample
        key = path if Path(path).name in sources else Path(path).name
        sources[key] = {"file": Path(path).name, "sha256": file_sha256(path), "weight": weight}
    notes = skipped(bad)
    if unused:
        notes.append(f"fields of the rows that are not used: {', '.join(unused)}")
    held_out_texts = {_identity(example) for example in held_out}
    distinct = [example for example in train if _identity(example) not in held_out_texts]
    if not distinct:
        raise DataError(f"{name}: all rows are copies of held-out rows; give rows that differ, or hold out none")
    if copies := len(train) - len(distinct):
        notes.append(f"{copies} rows are copies of held-out rows and are not trained on")
    if not data.mix and (repeated := len(distinct) - len({_identity(example) for example in distinct})):
        notes.append(f"{repeated} of {len(distinct)} rows repeat others, and are trained on each time")
    train, held_out = distinct, held_out[: data.held_out_limit]
    if data.learn_prompt:
        if any(example.messages for example in train):
            what = "data.learn_prompt does not apply to conversations"
            raise DataError(f"{name}: {what}; remove it, or set data.template: instruction")
        train, held_out = ([replace(row, learn_prompt=True) for row in part] for part in (train, held_out))
    sources["train"] = _source(data, data.path, len(train))
    if data.max_characters is not None:
        sources["train"]["too_long"] = len(rows) - len(short)
    if held_out:
        sources["held_out"] = _source(data, data.held_out or data.path, len(held_out))
    return TrainingData(train, held_out, sources, tuple(notes))


def skipped(bad: Sequence[str] | None) -> list[str]:
    """Return a note on the rows that `data.skip_bad_rows` leaves out, given what is wrong with each."""
    return [f"{len(bad)} rows are left out (data.skip_bad_rows), the first: {bad[0]}"] if bad else []


def _unused_fields(rows: Sequence[Row], examples: Sequence[Example], fields: Set[str]) -> list[str]:
    """Return the other fields of the first 1000 rows that have a text of several words which is in no example."""
    unused = set()
    for (_, row), example in itertools.islice(zip(rows, examples, strict=False), 1000):
        for name in row.keys() - fields:
            text = row[name].strip() if isinstance(row[name], str) else ""
            if " " in text and text not in example.whole:
                unused.add(name)
    return sorted(unused)


def _identity(example: Example) -> str:
    return json.dumps([example.prompt, example.response, example.messages, example.tools], default=str)


def _short_enough(rows: list[Row], format: str, limit: int, name: str) -> list[Row]:
    """Return the rows whose question and answer, with a space between, have at most `limit` characters."""
    if format == "messages":
        raise DataError(f"{name}: data.max_characters does not apply to conversations; remove it")
    short = [(place, row) for place, row in rows if len(" ".join(filter(None, _parts(row, format)))) <= limit]
    if not short:
        raise DataError(f"{name}: all {len(rows)} rows have more than {limit} characters (data.max_characters)")
    return short


def as_examples(format: str, rows: list[Row], template: str | None = None, chat: bool = False) -> list[Example]:
    """Return checked rows as examples; `chat` allows template `auto` to be `chat`. DataError if it does not fit."""
    default = TEMPLATES.get(format)
    if template == "auto":
        template = "chat" if chat and default == "instruction" else None
    if template is not None and default is None:
        raise DataError(f"data.template: {template} does not apply to {format} rows; remove it")
    formats = RESTRICTED.get(template or "", (format,))
    if format not in formats:
        raise DataError(
            f"data.template: {template} applies to {' and '.join(formats)} rows, not to {format}; remove it"
        )
    return [replace(_example(row, format, template or default), place=place) for place, row in rows]


def _example(row: Mapping[str, Any], format: str, template: str | None) -> Example:
    if format == "messages":
        return _conversation(row["messages"], row.get("tools") or (), row.get("learn_from", 0))
    task, material, response = _parts(row, format)
    if template == "direct" and format == "question_answer":
        return Example(direct_question({"question": _with_context(row, task)}), f" {final_number(row)}")
    if template == "direct":
        return Example(task, f" {response}")
    if template == "step_by_step":
        return Example(step_by_step(_with_context(row, task)), response)
    if template == "instruction":
        return Example(instruction_prompt(task, material), response)
    prompt = f"{task}\n\n{material}" if material.strip() else task
    if template == "chat":
        return _conversation([{"role": "user", "content": prompt}, {"role": "assistant", "content": response}])
    return Example(prompt, response)


def _with_context(row: Mapping[str, Any], question: str) -> str:
    return f"{context}\n\n{question}" if (context := (row.get("context") or "").strip()) else question


def _parts(row: Mapping[str, Any], format: str) -> tuple[str, str, str]:
    """Return a row's task, material and response."""
    if format == "text":
        return "", "", row["text"]
    if format == "alpaca":
        return row["instruction"], row.get("input") or "", row["output"]
    if format == "multiple_choice":
        question = _with_context(row, row["question"])
        return lettered({**row, "question": question}), "", letters(row)[row["answer"]]
    if format == "prompt_completion":
        return row["prompt"], "", row.get("completion", row.get("response"))
    question, answer = ("query", "response") if format == "query_response" else ("question", "answer")
    return row[question], row.get("context") or "", row[answer]


def _conversation(turns: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), learn_from: int = 0) -> Example:
    messages = tuple({**message, "content": message.get("content") or ""} for message in turns)
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    before = "\n\n".join(message["content"] for message in messages[:last])
    return Example(before, messages[last]["content"], messages, tools=tuple(tools), learn_from=learn_from)


def _split(examples: list[Example], fraction: float, name: str) -> tuple[list[Example], list[Example]]:
    count = max(1, round(fraction * len(examples)))
    if count >= len(examples):
        what = f"data.held_out_fraction {fraction} of {len(examples)} rows leaves none to train on"
        raise DataError(f"{name}: {what}; lower it, or give more rows")
    held_out = set(random.Random(SPLIT_SEED).sample(range(len(examples)), count))
    train = [example for index, example in enumerate(examples) if index not in held_out]
    return train, [examples[index] for index in sorted(held_out)]


def _source(data: DataSettings, path: str | None, rows: int) -> dict[str, Any]:
    if path is None:
        return {"hub": data.hub, "config": data.hub_config, "split": data.split or "train", "rows": rows}
    return {"file": Path(path).name, "sha256": file_sha256(path), "rows": rows}
