"""Text to measure drift on: the user's own file, or prose and code that come with every Python."""

import importlib.util
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

from hiplora.errors import DataError

# Chapters of Python's language reference and modules of its standard library, with a range of characters of each.
# A choice by name, so that it is the same text on every machine with the same Python.
PROSE: Mapping[str, tuple[int, int]] = {"objects": (0, 3600), "execmodel": (0, 3600), "import": (0, 3600)}
CODE: Mapping[str, tuple[int, int]] = {
    "textwrap": (1000, 4600),
    "heapq": (5200, 8800),
    "fractions": (1000, 4600),
}

_OVERLAP = 80  # characters in a row that count as "the same text"


def drift_texts(path: str | os.PathLike | None = None) -> dict[str, str]:
    """Return named texts to measure drift on: the file at `path`, else built-in English prose and Python code.

    Raises:
        DataError: the file is missing, empty or not UTF-8 text; or this Python lacks the built-in text.
    """
    if path is not None:
        return {Path(path).name: _read(Path(path))}
    return {"prose": _prose(), "python code": _code()}


def text_source(path: str | os.PathLike | None = None) -> str:
    """Describe in words where `drift_texts` takes its text from."""
    if path is not None:
        return f"file {Path(path).name}"
    return f"Python {platform.python_version()}: language reference (prose), standard library (code)"


def overlap(texts: Mapping[str, str], training: Sequence[str]) -> dict[str, float]:
    """Return, for each text, the share of its passages of 80 characters that stand in the training texts too.

    Drift is only meaningful on text that was not trained on; a share above 0 says that it was.
    """
    corpus = "\n\0\n".join(training)
    shares = {}
    for name, text in texts.items():
        passages = [text[i : i + _OVERLAP] for i in range(0, max(1, len(text) - _OVERLAP + 1), _OVERLAP)]
        shares[name] = sum(passage in corpus for passage in passages) / len(passages)
    return shares


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"--drift-text {path}: not UTF-8 text (byte {error.start}); convert it to UTF-8"
        ) from None
    except OSError as error:
        raise DataError(f"--drift-text {path}: cannot be read ({error.strerror}); name a text file") from None
    if not text.strip():
        raise DataError(f"--drift-text {path}: is empty; give a few thousand characters of text")
    return text


def _prose() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError("this Python has no pydoc_data, the built-in prose; pass --drift-text FILE") from None
    missing = [name for name in PROSE if name not in topics]
    if missing:
        raise DataError(f"this Python's reference lacks {', '.join(missing)}; pass --drift-text FILE")
    return "\n\n".join(topics[name][first:last] for name, (first, last) in PROSE.items())


def _code() -> str:
    parts = []
    for name, (first, last) in CODE.items():
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.origin or not spec.origin.endswith(".py"):
            raise DataError(f"this Python has no source of its module {name}; pass --drift-text FILE")
        parts.append(Path(spec.origin).read_text(encoding="utf-8")[first:last])
    return "\n\n".join(parts)
