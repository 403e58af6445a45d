"""What is measured on each adapter of a study: held-out loss, drift, and where its update lies."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hiplora.adapters import AdapterUpdate, allocation_rows, energy_shares
from hiplora.evaluation import BaseReference, Encoded, heldout_loss, measure_drift
from hiplora.evaluation.drift import AdapterOff, Texts
from hiplora.evaluation.mounting import mounted

_ROW = ("module", "layer", "type", "norm", "left", "right", "both", "sigma", "gains")


def base_reference(
    model: Any, tokenizer: Any, texts: Texts, max_tokens: int, window: int = 512
) -> BaseReference:
    """Run the bare base over the drift texts, in windows that fit the model's context."""
    context = getattr(model.config, "max_position_embeddings", None) or window
    return BaseReference.build(model, tokenizer, texts, window=min(window, context), max_tokens=max_tokens)


def measure_adapter(
    model: nn.Module, folder: Path, reference: BaseReference, heldout: Sequence[Encoded], batch_size: int
) -> dict[str, Any]:
    """Put an adapter on the bare `model`, measure it, and take it off again."""
    with mounted(model, folder) as adapted:
        return {
            "heldout_loss_after": heldout_loss(adapted, heldout, batch_size),
            "drift": drift_dict(adapted, reference),
        }


def drift_dict(
    model: nn.Module, reference: BaseReference, adapter_off: AdapterOff | None = None
) -> dict[str, dict[str, float]]:
    """Measure drift and return it as a section of the results; `adapter_off` as for `measure_drift`."""
    return {name: found.as_dict() for name, found in measure_drift(model, reference, adapter_off).items()}


def allocation(adapter: Path | AdapterUpdate, base: str, rank: int) -> list[dict[str, Any]]:
    """Return the results' rows on where an adapter's update lies on the spectrum of the base weights."""
    return [{key: row[key] for key in _ROW} for row in allocation_rows(adapter, base, rank)]


def energy_inside(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the share of an update's energy ‖ΔW‖² that reads and writes principal directions: `all`, and by type.

    `rows` are `allocation`'s; their shares `both` are weighted by the energy of each module's update.
    """
    kinds = {
        kind: [row for row in rows if row["type"] == kind] for kind in sorted({row["type"] for row in rows})
    }
    return {"all": energy_shares(rows)["both"]} | {
        kind: energy_shares(members)["both"] for kind, members in kinds.items()
    }
