"""Text to calibrate on: a plain text file, or the rows of a training file."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hiplora.errors import DataError
from hiplora.tuner.calibration import ROW_LENGTH

DATA_ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")


def calibration_rows(tokenizer: Any, file: str | Path, tokens: int) -> list[Tensor]:
    """Return up to `tokens` token ids of a file in rows of 256, each begun as the tokenizer begins a text.

    Files that end as training data do (.jsonl, .json, .parquet, gzipped or not) are read as such, prompt and
    response of a row together; any other is plain text.

    Raises:
        DataError: the file cannot be read, is not UTF-8, is empty or has rows that cannot be used.
    """
    path = Path(file)
    text = _rows_text(path) if path.name.endswith(DATA_ENDINGS) else _plain_text(path)
    # verbose=False: a text longer than the model's context is no mistake here, it is cut.
    ids = tokenizer(text[: 64 * tokens], add_special_tokens=False, verbose=False)["input_ids"][:tokens]
    begin = tokenizer("x")["input_ids"][:1]
    begin = begin if begin == [tokenizer.bos_token_id] else []
    width = ROW_LENGTH - len(begin)
    return [torch.tensor(begin + ids[first : first + width]) for first in range(0, len(ids), width)]


def _rows_text(path: Path) -> str:
    from hiplora.training.data import load_examples

    examples = load_examples(path)
    return "\n\n".join(
        example.prompt + example.response
        if not example.messages
        else "\n\n".join(message["content"] for message in example.messages)
        for example in examples
    )


def _plain_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); convert it to UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); name a text or data file") from None
    if not text.strip():
        raise DataError(f"{path}: is empty; give some ten thousand tokens of text")
    return text
