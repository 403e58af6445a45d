"""Project a trained adapter off its layers' inputs, and measure drift and loss before and after."""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from hiplora.adapters import (
    AdapterUpdate,
    check_base,
    check_projection,
    is_transposed,
    load_base,
    open_update,
    protect,
    remaining,
    save_as_lora,
    totals,
    write_lora,
)
from hiplora.data.encoding import encode_examples
from hiplora.data.examples import load_examples
from hiplora.data.texts import calibration_rows, describe_source, drift_texts, overlap, text_source
from hiplora.errors import ConfigError, first_line
from hiplora.evaluation import BaseReference, Encoded, heldout_loss, measure_drift
from hiplora.evaluation.drift import cut_windows
from hiplora.evaluation.mounting import mounted
from hiplora.models import resolve
from hiplora.spectral import MomentBasis, RankSpec
from hiplora.tuner import SELF, TOKENS_PER_INPUT, input_bases

DRIFT_TOKENS = 1024  # of each text
DRIFT_WINDOW = 512
DATA_ROWS = 256  # of the task data at most
DATA_LENGTH = 1024  # tokens of a row at most


@dataclass(frozen=True)
class ProtectSettings:
    """How an update is projected (`hiplora.adapters.protect`), and what it is measured on.

    `text` (a file, or a data set on the hub) is what the layers' inputs are measured on; None samples text from the
    base model with `seed`. `tokens` are sampled or read. `data` is a file with rows of the adapter's task,
    `drift_text` one with text to measure drift on.
    """

    principal_rank: RankSpec = 32
    projection: str = "hard"
    strength: float = 1.0
    text: str | Path | None = None
    tokens: int = 10_000
    seed: int = 0
    data: str | Path | None = None
    drift_text: str | Path | None = None

    def __post_init__(self) -> None:
        """Check the projection."""
        check_projection(self.principal_rank, self.strength, self.projection)


def protect_adapter(
    adapter_dir: str | os.PathLike | AdapterUpdate,
    path: str | os.PathLike,
    settings: ProtectSettings | None = None,
    *,
    base: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Project a trained adapter off its layers' inputs, measure that, and write the result as a plain LoRA folder.

    Args:
        adapter_dir: an adapter folder that `read_update` reads, or an update.
        path: output folder; `overwrite` replaces one that exists.
        settings: None takes the defaults.
        base: base model, path or name, instead of the one in the adapter's configuration.

    Returns:
        a JSON-ready record: `modules` and `summary` (what is left of the update, and of what it does to the layers'
        outputs on the calibration text), `drift` before and after, `loss` on the task data, if any, `notes`, and the
        `export`'s own record.

    Raises:
        AdapterError: the adapter cannot be read, does not fit the base model, or changes nothing.
        ConfigError, DataError: `path` exists, or a setting, text or data cannot be used. Nothing is written then.
    """
    chosen = settings or ProtectSettings()
    update = open_update(adapter_dir, path, overwrite, base=base)
    texts = drift_texts(chosen.drift_text)
    tokenizer, rows, examples, notes = _inputs(update.base, chosen, texts)
    model: Any = load_base(update.base, torch.float32)
    check_base(model, update, update.base)
    bases = input_bases(model, list(update.factors), rows=rows, tokens=chosen.tokens, seed=chosen.seed)
    projected = protect(update, bases, chosen.principal_rank, chosen.strength, chosen.projection)
    left = remaining(update, projected, bases, chosen.principal_rank)
    drift, loss = _measured(model, tokenizer, texts, examples, {"before": update, "after": projected})
    if loss:
        loss |= {"file": Path(str(chosen.data)).name, "rows": len(examples)}
    record = {
        "schema": 1,
        "kind": "protection",
        "adapter": update.source,
        "base": update.base,
        "method": update.kind,
        "principal_rank": chosen.principal_rank,
        "projection": chosen.projection,
        "strength": chosen.strength,
        "calibration": {
            "source": SELF if chosen.text is None else describe_source(chosen.text),
            "tokens": min(inputs.tokens for inputs in bases.values()),
        },
        "modules": left,
        "summary": totals(left),
        "drift": drift,
        "drift_text": text_source(chosen.drift_text),
        "loss": loss or None,
        "notes": [*notes, *_notes(update, projected, bases)],
    }
    report = save_as_lora(projected, path, overwrite=overwrite, details={"protection": record})
    return record | {"export": report.to_json()}


def _inputs(
    base: str, settings: ProtectSettings, texts: Mapping[str, str]
) -> tuple[Any, list[Any] | None, list[Encoded], list[str]]:
    """Return tokenizer, calibration rows (None samples them), task examples and notes; no model is loaded."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(base), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {base}: its tokenizer cannot be loaded ({first_line(error)})") from error
    cut_windows(tokenizer, texts, DRIFT_WINDOW, DRIFT_TOKENS)
    rows, examples, notes = None, [], []
    if settings.text is not None:
        rows = calibration_rows(tokenizer, settings.text, settings.tokens)
        shares = overlap(texts, [tokenizer.decode(row, skip_special_tokens=True) for row in rows])
        seen = [f"{share:.0%} of “{name}”" for name, share in shares.items() if share]
        notes += [f"the calibration text holds drift text too: {', '.join(seen)}"] if seen else []
    if settings.data is not None:
        found, length = load_examples(Path(settings.data)), min(tokenizer.model_max_length, DATA_LENGTH)
        encoded, report = encode_examples(tokenizer, found[:DATA_ROWS], length)
        examples = [Encoded(tuple(row["input_ids"]), tuple(row["labels"])) for row in encoded]
        if len(found) > DATA_ROWS:
            notes.append(f"the loss is of the first {DATA_ROWS} of the {len(found)} rows")
        if changed := report.truncated + report.left_out:
            notes.append(f"{changed} of {report.examples} rows are too long: cut or left out")
    return tokenizer, rows, examples, notes


def _measured(
    model: Any,
    tokenizer: Any,
    texts: Mapping[str, str],
    examples: Sequence[Encoded],
    updates: Mapping[str, AdapterUpdate],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return drift and loss of each update as a plain LoRA adapter on the model, and the loss of the base."""
    reference = BaseReference.build(model, tokenizer, texts, window=DRIFT_WINDOW, max_tokens=DRIFT_TOKENS)
    drift: dict[str, Any] = {}
    loss: dict[str, Any] = {}
    if examples:
        loss["tokens"] = sum(len(example.scored) for example in examples)
        loss["base"] = heldout_loss(model, examples)
    for name, update in updates.items():
        nameless = replace(update, base="")  # PEFT would look up the base's name
        with tempfile.TemporaryDirectory(prefix="hiplora-") as folder:
            write_lora(nameless, Path(folder), transposed=is_transposed(nameless, model))
            with mounted(model, folder) as adapted:
                found = measure_drift(adapted, reference, may_be_nothing=name == "after")
                drift[name] = {text: value.as_dict() for text, value in found.items()}
                if examples:
                    loss[name] = heldout_loss(adapted, examples)
    return drift, loss


def _notes(before: AdapterUpdate, after: AdapterUpdate, bases: Mapping[str, MomentBasis]) -> Iterator[str]:
    """Yield caveats on the numbers."""
    if before.extras:
        yield f"modules_to_save ({', '.join(sorted(before.extras))}) are kept: only low-rank updates are projected"
    widest = max(inputs.vectors.shape[0] for inputs in bases.values())
    tokens = min(inputs.tokens for inputs in bases.values())
    if tokens < (needed := TOKENS_PER_INPUT * widest):
        yield f"calibrated on {tokens} tokens, few for inputs {widest} wide: give at least {needed}"
    if not any(A.any() and B.any() for A, B in after.factors.values()):
        yield "nothing of the low-rank update is left" + ("" if before.extras else ": the result is the base model")
