"""Adapters as plain updates: read them, inspect them, write them as stock LoRA or as a dense model."""

import importlib
from typing import TYPE_CHECKING, Any

_LAZY = {
    "AdapterUpdate": "hiplora.adapters.adapter",
    "Channels": "hiplora.adapters.adapter",
    "read_update": "hiplora.adapters.update",
    "update_from_model": "hiplora.adapters.update",
    "ExportReport": "hiplora.adapters.lora",
    "save_as_lora": "hiplora.adapters.lora",
    "DenseReport": "hiplora.adapters.dense",
    "save_dense": "hiplora.adapters.dense",
    "Finding": "hiplora.adapters.preflight",
    "base_facts": "hiplora.adapters.preflight",
    "server_findings": "hiplora.adapters.preflight",
    "allocation_rows": "hiplora.adapters.inspection",
    "inspect_adapter": "hiplora.adapters.inspection",
    "Remaining": "hiplora.adapters.protection",
    "protect": "hiplora.adapters.protection",
    "remaining": "hiplora.adapters.protection",
    "save_as_hiplora": "hiplora.adapters.native",
}

if TYPE_CHECKING:
    from hiplora.adapters.adapter import AdapterUpdate, Channels
    from hiplora.adapters.dense import DenseReport, save_dense
    from hiplora.adapters.inspection import allocation_rows, inspect_adapter
    from hiplora.adapters.lora import ExportReport, save_as_lora
    from hiplora.adapters.native import save_as_hiplora
    from hiplora.adapters.preflight import Finding, base_facts, server_findings
    from hiplora.adapters.protection import Remaining, protect, remaining
    from hiplora.adapters.update import read_update, update_from_model

__all__ = [
    "AdapterUpdate",
    "Channels",
    "DenseReport",
    "ExportReport",
    "Finding",
    "Remaining",
    "allocation_rows",
    "base_facts",
    "inspect_adapter",
    "protect",
    "read_update",
    "remaining",
    "save_as_hiplora",
    "save_as_lora",
    "save_dense",
    "server_findings",
    "update_from_model",
]


def __getattr__(name: str) -> Any:
    """Load a public name on first use: reading an adapter should not import the dense exporter."""
    if name not in _LAZY:
        raise AttributeError(f"module 'hiplora.adapters' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
