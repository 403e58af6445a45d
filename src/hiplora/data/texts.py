"""Texts to measure on: prose and code for drift, and text to calibrate a basis on."""

import importlib
import inspect
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hiplora.data.encoding import beginning
from hiplora.data.examples import as_examples, load_examples
from hiplora.data.rows import SUFFIXES, check_rows, decoded, hub_rows, is_hub_name
from hiplora.errors import DataError
from hiplora.positions import within_context

if TYPE_CHECKING:
    from torch import Tensor

# Chapters of Python's language reference and modules of its standard library, with the first of the 3,600 characters
# that are taken of each: the same text on every machine with the same Python.
PROSE = {"objects": 0, "execmodel": 0, "import": 0}
CODE = {"textwrap": 1000, "heapq": 5200, "fractions": 1000}
OVERLAP = 80  # characters of a passage that count as the same text
ROW_LENGTH = 256  # tokens in a row of calibration text


def drift_texts(path: str | os.PathLike | None = None) -> dict[str, str]:
    """Return named texts to measure drift on: the file at `path`, else built-in English prose and Python code."""
    if path is not None:
        return {Path(path).name: _read(Path(path))}
    from pydoc_data.topics import topics

    prose = [topics[name][first : first + 3600] for name, first in PROSE.items()]
    code = [inspect.getsource(importlib.import_module(name))[first : first + 3600] for name, first in CODE.items()]
    return {"prose": "\n\n".join(prose), "python code": "\n\n".join(code)}


def text_source(path: str | os.PathLike | None = None) -> str:
    """Describe where `drift_texts` takes its text from."""
    if path is not None:
        return f"file {Path(path).name}"
    return f"Python {platform.python_version()}: language reference (prose), standard library (code)"


def overlap(texts: Mapping[str, str], training: Sequence[str]) -> dict[str, float]:
    """Return the share of each text's passages of 80 characters that occur in the training texts.

    Drift is meaningful only on text that was not trained on.
    """
    corpus = "\n\0\n".join(training)
    shares = {}
    for name, text in texts.items():
        passages = [text[i : i + OVERLAP] for i in range(0, max(1, len(text) - OVERLAP + 1), OVERLAP)]
        shares[name] = sum(passage in corpus for passage in passages) / len(passages)
    return shares


def calibration_rows(tokenizer: Any, source: str | Path, tokens: int, model: Any) -> "list[Tensor]":
    """Return up to `tokens` token ids of a text, in rows of 256 that begin as the tokenizer begins a text.

    Rows are shorter where the model, which may be without weights, reads less.

    `source` is a training file (by its suffix; prompt and response of each row), a data set on the hub (its train
    split, streamed), or else a plain text file; DataError says why it cannot be used.
    """
    import torch

    if is_hub_name(source):
        text = _hub_text(str(source), 8 * tokens)
    elif str(source).endswith(SUFFIXES):
        text = "\n\n".join(example.whole for example in load_examples(source))
    else:
        text = _read(Path(source))
    width = within_context(ROW_LENGTH, model)
    return [torch.tensor(row) for row in token_rows(tokenizer, text, tokens, width)]


def token_rows(tokenizer: Any, text: str, tokens: int, width: int) -> list[list[int]]:
    """Cut the first `tokens` tokens of a text into rows of `width`, each begun as the tokenizer begins a text."""
    begin = beginning(tokenizer)
    # verbose=False: a text longer than the model's context is no mistake here.
    ids = tokenizer(text[: 64 * tokens], add_special_tokens=False, verbose=False)["input_ids"][:tokens]
    step = width - len(begin)
    return [begin + ids[first : first + step] for first in range(0, len(ids), step)]


def describe_source(source: str | Path) -> str:
    """Describe where calibration text comes from."""
    return f"data set {source}" if is_hub_name(source) else f"file {Path(source).name}"


def _hub_text(source: str, characters: int) -> str:
    """Return the first rows of a data set on the hub, up to at least so many characters."""
    name, _, config = source.partition(":")
    rows, length = [], 0
    for place, row in hub_rows(name, config or None, streaming=True):
        rows.append((place, row))
        length += _characters(row)
        if length >= characters:
            break
    return "\n\n".join(example.whole for example in as_examples(*check_rows(rows, "auto", source)))


def _characters(value: Any) -> int:
    """Count the characters of all texts in a row, those of messages too."""
    if isinstance(value, str):
        return len(value)
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return sum(map(_characters, parts))


def _read(path: Path) -> str:
    try:
        text = decoded(path.read_bytes(), path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); name a text or data file") from None
    if not text.strip():
        raise DataError(f"{path}: is empty; give some ten thousand characters of text")
    return text
