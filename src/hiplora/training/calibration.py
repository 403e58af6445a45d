"""Text to calibrate on: a plain text file, the rows of a training file, or a data set on the hub."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hiplora.errors import DataError
from hiplora.recipes.methods import FromInputs, Spectral
from hiplora.recipes.rows import SUFFIXES, hub_rows, is_hub_name
from hiplora.tuner import HipLoraConfig, calibrate
from hiplora.tuner.calibration import ROW_LENGTH, Calibration
from hiplora.tuner.moments import CalibrationStore

if TYPE_CHECKING:
    from hiplora.training.data import Example


def calibration_rows(tokenizer: Any, source: str | Path, tokens: int) -> list[Tensor]:
    """Return up to `tokens` token ids of a text in rows of 256, each begun as the tokenizer begins a text.

    Files that end as training data do (.jsonl, .json, .parquet, gzipped or not) are read as such, prompt and
    response of a row together; so is the train split of a data set on the hub (`is_hub_name`), of which no more is
    fetched than is needed; any other file is plain text.

    Raises:
        DataError: the text cannot be read, is not UTF-8, is empty or has rows that cannot be used.
    """
    path = Path(source)
    if is_hub_name(source):
        text = _hub_text(str(source), 8 * tokens)
    else:
        text = _rows_text(path) if path.name.endswith(SUFFIXES) else _plain_text(path)
    # verbose=False: a text longer than the model's context is no mistake here, it is cut.
    ids = tokenizer(text[: 64 * tokens], add_special_tokens=False, verbose=False)["input_ids"][:tokens]
    begin = tokenizer("x")["input_ids"][:1]
    begin = begin if begin == [tokenizer.bos_token_id] else []
    width = ROW_LENGTH - len(begin)
    return [torch.tensor(begin + ids[first : first + width]) for first in range(0, len(ids), width)]


def calibrate_for(
    method: Spectral,
    config: HipLoraConfig,
    model: Any,
    tokenizer: Any,
    store: CalibrationStore | None = None,
) -> Calibration:
    """Measure the activation basis of a recipe's method into its configuration: on its text, else on sampled text.

    What was measured before is read from `store`, that of the user's cache if None.

    Raises:
        DataError: as `calibration_rows`.
        ConfigError: as `hiplora.calibrate`.
    """
    rows = asked_rows(method, tokenizer)
    source = "" if method.calibration_text is None else describe_source(method.calibration_text)
    tokens = method.calibration_tokens
    return calibrate(model, config, rows=rows, source=source, tokens=tokens, store=store)


def asked_rows(method: Spectral | FromInputs, tokenizer: Any) -> list[Tensor] | None:
    """Return the rows that a method is to be calibrated on; None for text sampled from the model.

    Raises:
        DataError: as `calibration_rows`.
    """
    if method.calibration_text is None:
        return None
    return calibration_rows(tokenizer, method.calibration_text, method.calibration_tokens)


def describe_source(source: str | Path) -> str:
    """Say in words where calibration text came from."""
    return f"data set {source}" if is_hub_name(source) else f"file {Path(source).name}"


def _rows_text(path: Path) -> str:
    from hiplora.training.data import load_examples

    return _joined(load_examples(path))


def _hub_text(name: str, characters: int) -> str:
    """Return the first rows of a data set on the hub, at least so many characters of them if it has as many."""
    from hiplora.training.data import rows_as_examples

    rows, length = [], 0
    for place, row in hub_rows(name):
        rows.append((place, row))
        length += sum(len(value) for value in row.values() if isinstance(value, str))
        if length >= characters:
            break
    return _joined(rows_as_examples(rows, name))


def _joined(examples: "list[Example]") -> str:
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
