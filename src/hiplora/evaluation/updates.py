"""Updates in memory: their drift from the base, their loss on rows of their task, and their scale."""

import functools
import math
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hiplora.adapters import AdapterUpdate, BaseWeights, load_for
from hiplora.data.encoding import encode_examples
from hiplora.data.examples import DataSettings, load_data
from hiplora.errors import ConfigError
from hiplora.evaluation.drift import BaseReference, Texts, measure_drift
from hiplora.evaluation.likelihood import Encoded, heldout_loss
from hiplora.evaluation.mounting import applied, holding
from hiplora.models import load_tokenizer
from hiplora.positions import within_context
from hiplora.tuner.experts import unrolled

DRIFT_TOKENS = 1024  # of each text
DRIFT_WINDOW = 512
DATA_ROWS = 256  # of the task data at most
DATA_LENGTH = 1024  # tokens of a row at most


def task_rows(tokenizer: Any, file: str | Path, model: Any) -> tuple[list[Encoded], list[str]]:
    """Return encoded rows of a task, 256 of at most 1024 tokens, and notes on what was left out.

    Rows are shorter where the model, which may be without weights, reads less. DataError if the file has no rows that
    can be used.
    """
    data = DataSettings(path=str(file), template="auto")
    length = within_context(min(tokenizer.model_max_length, DATA_LENGTH), model)
    examples = load_data(data, chat=bool(tokenizer.chat_template)).train  # worded as `hiplora train` words them
    encoded, report = encode_examples(tokenizer, examples[:DATA_ROWS], length)
    notes = []
    if len(examples) > DATA_ROWS:
        notes.append(f"the loss is of the first {DATA_ROWS} of the {len(examples)} rows")
    if changed := report.truncated + report.left_out:
        notes.append(f"{changed} of {report.examples} rows are too long: cut or left out")
    return [Encoded(tuple(row["input_ids"]), tuple(row["labels"])) for row in encoded], notes


def measure_updates(
    model: nn.Module,
    tokenizer: Any,
    updates: Mapping[str, AdapterUpdate],
    texts: Texts,
    examples: Sequence[Encoded] = (),
    may_be_nothing: Container[str] = (),
) -> tuple[dict[str, Any], dict[str, float]]:
    """Add each update to a bare model's weights in turn, and measure drift on texts and loss on rows of its task.

    Returns name → text → drift, and name → loss in nats per token with the `base`'s; no losses without `examples`.
    AdapterError if an update does not fit the model, or changes no logit and is not in `may_be_nothing`.
    """
    drift = {}
    with unrolled(model):
        reference = BaseReference.build(model, tokenizer, texts, window=DRIFT_WINDOW, max_tokens=DRIFT_TOKENS)
        losses = {"base": heldout_loss(model, examples)} if examples else {}
        for name, update in updates.items():
            changed = [*(f"{module}.weight" for module in update.modules), *update.extras]
            off = functools.partial(holding, model, {weight: model.get_parameter(weight) for weight in changed})
            with applied(model, update):
                measured = measure_drift(model, reference, off, may_be_nothing=name in may_be_nothing)
                drift[name] = {text: value.as_dict() for text, value in measured.items()}
                if examples:
                    losses[name] = heldout_loss(model, examples)
    return drift, losses


def smallest_scale(loss: Callable[[float], float], tolerance: float, halvings: int = 6) -> dict[str, Any]:
    """Find the smallest scale in (0, 1] at which a loss is at most `tolerance` above that at scale 1, by bisection.

    `loss` gives the loss at a scale; the scales at which it is within the tolerance are taken to be without a gap. The
    scale found is a multiple of 2⁻⁶. Returns `scale`, `tolerance`, and `losses`: scale and loss of all that were tried.
    """
    if not 0 <= tolerance < math.inf:
        raise ConfigError(f"tolerance is {tolerance}; expected a number of nats, 0 or more")
    curve, low, high = {1.0: loss(1.0)}, 0.0, 1.0
    for _ in range(halvings):
        middle = (low + high) / 2
        curve[middle] = loss(middle)
        low, high = (low, middle) if curve[middle] <= curve[1.0] + tolerance else (middle, high)
    losses = [{"scale": scale, "loss": curve[scale]} for scale in sorted(curve)]
    return {"scale": high, "tolerance": tolerance, "losses": losses}


def search_scale(
    model: nn.Module, update: AdapterUpdate, examples: Sequence[Encoded], tolerance: float
) -> dict[str, Any]:
    """Return `smallest_scale` of an update of a bare model, by its loss on held-out rows."""

    def loss(scale: float) -> float:
        with applied(model, update.scaled(scale)):
            return heldout_loss(model, examples)

    return smallest_scale(loss, tolerance)


def choose_scale(
    update: AdapterUpdate,
    scale: float | None,
    tolerance: float | None,
    data: str | Path | None,
    device: str = "auto",
) -> tuple[float, dict[str, Any] | None]:
    """Return the given scale, 1 if none, or with a tolerance the one found on the rows of `data`, with its record.

    ConfigError if the options do not go together or the base has no tokenizer; DataError or AdapterError if the rows or
    the base cannot be used.
    """
    check_scale_options(scale, tolerance, data)
    if tolerance is None or data is None:
        if data is not None:
            raise ConfigError("--data: is what --tolerance measures the loss on; give that too, or leave --data out")
        return 1.0 if scale is None else scale, None
    tokenizer = load_tokenizer(update.base)
    examples, notes = task_rows(tokenizer, data, BaseWeights.of(update).skeleton)
    record = search_scale(load_for(update, device), update, examples, tolerance)
    return record["scale"], record | {"notes": notes}


def check_scale_options(scale: float | None, tolerance: float | None, data: str | Path | None) -> None:
    """Raise ConfigError if a scale and a tolerance are given, or a tolerance without rows to measure on."""
    if tolerance is not None and scale is not None:
        raise ConfigError("--scale and --tolerance: give one of them; --tolerance searches the scale")
    if tolerance is not None and data is None:
        raise ConfigError("--tolerance: needs --data, rows of the adapter's task that it was not trained on")
