"""An adapter projected off its layers' inputs, and what that did: drift and loss before and after."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hiplora.adapters import AdapterUpdate, base_facts, protect, read_update, remaining, save_as_lora
from hiplora.adapters.base_weights import BaseWeights, load_base
from hiplora.adapters.check import quiet_loading
from hiplora.adapters.dense import check_base
from hiplora.adapters.folder import check_out
from hiplora.adapters.lora import write_lora
from hiplora.adapters.protection import check_projection, check_widths, totals
from hiplora.data.encoding import encode_examples
from hiplora.data.examples import load_examples
from hiplora.data.texts import calibration_rows, describe_source, drift_texts, overlap, text_source
from hiplora.evaluation import Encoded, heldout_loss, measure_drift
from hiplora.evaluation.drift import cut_windows
from hiplora.spectral import MomentBasis, RankSpec
from hiplora.study.measure import base_reference
from hiplora.study.preflight import load_tokenizer
from hiplora.tuner.calibration import SELF, TOKENS_PER_INPUT, input_bases

DRIFT_TOKENS = 1024  # of each text
DATA_ROWS = 256  # of the task data at most
DATA_LENGTH = 1024  # tokens of a row at most

Wrap = Callable[[Sequence[str], str], Iterable[str]]


@dataclass(frozen=True)
class ProtectSettings:
    """How an update is projected (`hiplora.adapters.protect`), and what it is measured on.

    `text` (a file, or a data set on the hub) is what the layers' inputs are measured on, else text sampled from the
    base model with `seed`; `tokens` are sampled, or read of it. `data` is a file with rows of the adapter's task,
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
        """Refuse values that make no sense."""
        check_projection(self.principal_rank, self.strength, self.projection)


def protect_adapter(
    adapter_dir: str | os.PathLike | AdapterUpdate,
    path: str | os.PathLike,
    settings: ProtectSettings | None = None,
    *,
    base: str | None = None,
    overwrite: bool = False,
    wrap: Wrap | None = None,
) -> dict[str, Any]:
    """Project a trained adapter off its layers' inputs, measure that, and write the result as a plain LoRA folder.

    Args:
        adapter_dir: an adapter folder, HiP-LoRA, Proj-LoRA or LoRA, or an update.
        path: output folder.
        settings: how; the defaults if None.
        base: base model, path or name, where the one in the adapter's configuration is not to be used.
        overwrite: replace `path` if it exists.
        wrap: called with a sequence and what is done with it, yields its items; for a progress bar.

    Returns:
        the record of `protect_update`, with the export's under `export`.

    Raises:
        AdapterError: the adapter cannot be read, does not fit the base model, or changes nothing.
        ConfigError, DataError: `path` exists, or a setting, text or data cannot be used. Nothing is written then.
    """
    source = adapter_dir.source if isinstance(adapter_dir, AdapterUpdate) else str(adapter_dir)
    check_out(path, overwrite, source)
    update = read_update(adapter_dir, base)
    update = replace(update, base=base or update.base)
    check_out(path, overwrite, update.base, "its base model")
    projected, record = protect_update(update, settings, wrap=wrap)
    report = save_as_lora(projected, path, overwrite=overwrite, details={"protection": record})
    return record | {"export": report.to_json()}


def protect_update(
    update: AdapterUpdate, settings: ProtectSettings | None = None, *, wrap: Wrap | None = None
) -> tuple[AdapterUpdate, dict[str, Any]]:
    """Project an update off its layers' inputs; return it, and a JSON-ready record of what that took and cost.

    The record has `modules` and `summary` (what is left of the update, and of what it does to the layers' outputs on
    the calibration text), `drift` before and after, `loss` on the task data where there is any, and `notes`.

    Raises:
        AdapterError, ConfigError, DataError: as `protect_adapter`; all that can be is found before a model loads.
    """
    chosen, wrap = settings or ProtectSettings(), wrap or (lambda items, what: items)
    update.check_leak()
    check_widths(update, chosen.principal_rank)
    ground = _Ground.prepare(update.base, chosen)
    model = load_base(update.base, torch.float32)
    check_base(model, update, update.base)
    modules = list(update.factors)
    bases = input_bases(model, modules, rows=ground.rows, tokens=chosen.tokens, seed=chosen.seed)
    how = chosen.principal_rank, chosen.strength, chosen.projection
    projected = protect(update, bases, *how, wrap=lambda names: wrap(list(names), "projecting modules"))
    left = remaining(update, projected, bases, chosen.principal_rank)
    measured = _measured(model, ground, {"before": update, "after": projected}, wrap)
    return projected, {
        **_header(update, chosen, bases),
        "modules": [row.as_dict() for row in left],
        "summary": totals(left),
        **measured,
        "notes": [*ground.notes, *_notes(update, projected, bases, measured["drift"]["after"])],
    }


def _header(
    update: AdapterUpdate, settings: ProtectSettings, bases: Mapping[str, MomentBasis]
) -> dict[str, Any]:
    text = settings.text
    return {
        "schema": 1,
        "kind": "protection",
        "adapter": update.source,
        "base": update.base,
        "method": update.kind,
        "principal_rank": settings.principal_rank,
        "projection": settings.projection,
        "strength": settings.strength,
        "calibration": {
            "source": SELF if text is None else describe_source(text),
            "tokens": min(inputs.tokens for inputs in bases.values()),
        },
    }


@dataclass(frozen=True)
class _Ground:
    """What an update is measured on: tokenizer, drift texts, calibration rows and task examples, all checked."""

    tokenizer: Any
    texts: Mapping[str, str]
    rows: list[Any] | None
    examples: list[Encoded]
    sources: dict[str, str]
    notes: list[str]

    @classmethod
    def prepare(cls, base: str, settings: ProtectSettings) -> "_Ground":
        texts = drift_texts(settings.drift_text)
        context = getattr(BaseWeights(base).config, "max_position_embeddings", None) or DATA_LENGTH
        tokenizer = load_tokenizer(base)
        cut_windows(tokenizer, texts, 512, DRIFT_TOKENS)
        rows: list[Any] | None = None
        examples: list[Encoded] = []
        notes, sources = [], {"drift": text_source(settings.drift_text)}
        if settings.text is not None:
            rows = calibration_rows(tokenizer, settings.text, settings.tokens)
            seen = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
            notes += [
                f"{share:.0%} of the drift text “{name}” stands in the calibration text too: its drift says little"
                for name, share in overlap(texts, seen).items()
                if share
            ]
        if settings.data is not None:
            examples, said = _task_rows(tokenizer, Path(settings.data), min(context, DATA_LENGTH))
            notes, sources = notes + said, sources | {"data": Path(settings.data).name}
        return cls(tokenizer, texts, rows, examples, sources, notes)


def _task_rows(tokenizer: Any, path: Path, max_length: int) -> tuple[list[Encoded], list[str]]:
    """Tokenise the first rows of a data file as training does; return them with notes on what was left out."""
    examples = load_examples(path)
    rows, report = encode_examples(tokenizer, examples[:DATA_ROWS], max_length)
    notes = []
    if len(examples) > DATA_ROWS:
        notes.append(f"the loss is of the first {DATA_ROWS} of the {len(examples)} rows of {path.name}")
    for count, what in ((report.truncated, "cut at"), (report.left_out, "left out: their prompts fill")):
        if count:
            notes.append(f"{count} of {report.examples} rows of {path.name} are {what} {max_length} tokens")
    return [Encoded(tuple(row["input_ids"]), tuple(row["labels"])) for row in rows], notes


def _measured(
    model: Any, ground: _Ground, updates: Mapping[str, AdapterUpdate], wrap: Wrap
) -> dict[str, Any]:
    """Measure drift and loss of a bare model and of updates on it; the model is taken apart by that."""
    steps = iter(wrap(["base", *updates], "measuring drift and loss"))
    next(steps)
    reference = base_reference(model, ground.tokenizer, ground.texts, DRIFT_TOKENS)
    loss: dict[str, Any] | None = None
    if ground.examples:
        tokens = sum(len(example.scored) for example in ground.examples)
        loss = {"file": ground.sources["data"], "rows": len(ground.examples), "tokens": tokens}
        loss["base"] = heldout_loss(model, ground.examples)
    drift: dict[str, Any] = {}
    with _carrying(model, updates) as adapted:
        for name in steps:
            adapted.set_adapter(name)
            found = measure_drift(adapted, reference, may_be_nothing=name == "after")
            drift[name] = {text: value.as_dict() for text, value in found.items()}
            if loss is not None:
                loss[name] = heldout_loss(adapted, ground.examples)
    return {"drift": drift, "drift_text": ground.sources["drift"], "loss": loss}


@contextlib.contextmanager
def _carrying(model: Any, updates: Mapping[str, AdapterUpdate]) -> Iterator[Any]:
    """Yield a PEFT model with all of the updates as plain LoRA adapters, by name, none of them merged."""
    from peft import PeftModel

    adapted: Any = None
    with tempfile.TemporaryDirectory(prefix="hiplora-") as temporary:
        for name, update in updates.items():
            facts, folder = base_facts(update, model), Path(temporary) / name
            folder.mkdir()
            # Without the base's name, which PEFT would look up.
            plain = replace(update, base="")
            write_lora(plain, folder, transposed=facts is not None and facts.transposed)
            with quiet_loading():
                if adapted is None:
                    adapted = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
                else:
                    adapted.load_adapter(str(folder), adapter_name=name)
        yield adapted.eval()


def _notes(
    before: AdapterUpdate,
    after: AdapterUpdate,
    bases: Mapping[str, MomentBasis],
    drift: Mapping[str, Mapping[str, float]],
) -> Iterator[str]:
    """Say what a reader of the numbers should know."""
    if before.extras:
        names = ", ".join(sorted(before.extras))
        yield f"modules_to_save ({names}) are kept as they are: only low-rank updates are projected"
    widest = max(inputs.vectors.shape[0] for inputs in bases.values())
    tokens = min(inputs.tokens for inputs in bases.values())
    if tokens < (needed := TOKENS_PER_INPUT * widest):
        yield f"calibrated on {tokens} tokens, few for inputs {widest} wide: give at least {needed}"
    if not any(A.any() and B.any() for A, B in after.factors.values()):
        yield "nothing of the low-rank update is left" + (
            "" if before.extras else ": the result is the base model"
        )
    elif not any(found["kl"] for found in drift.values()):
        yield "what is left of the update changes no logit on the drift text"
