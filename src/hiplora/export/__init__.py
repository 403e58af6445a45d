"""Adapters as plain updates: read them, inspect them, write them as stock LoRA or as a dense model."""

import importlib
from typing import TYPE_CHECKING, Any

_LAZY = {
    "AdapterUpdate": "hiplora.export.adapter",
    "Channels": "hiplora.export.adapter",
    "read_update": "hiplora.export.update",
    "update_from_model": "hiplora.export.update",
    "ExportReport": "hiplora.export.lora",
    "save_as_lora": "hiplora.export.lora",
    "DenseReport": "hiplora.export.dense",
    "save_dense": "hiplora.export.dense",
    "Finding": "hiplora.export.preflight",
    "base_facts": "hiplora.export.preflight",
    "server_findings": "hiplora.export.preflight",
    "allocation_rows": "hiplora.export.inspection",
    "inspect_adapter": "hiplora.export.inspection",
    "Remaining": "hiplora.export.protection",
    "protect": "hiplora.export.protection",
    "remaining": "hiplora.export.protection",
    "save_as_hiplora": "hiplora.export.native",
}

if TYPE_CHECKING:
    from hiplora.export.adapter import AdapterUpdate, Channels
    from hiplora.export.dense import DenseReport, save_dense
    from hiplora.export.inspection import allocation_rows, inspect_adapter
    from hiplora.export.lora import ExportReport, save_as_lora
    from hiplora.export.native import save_as_hiplora
    from hiplora.export.preflight import Finding, base_facts, server_findings
    from hiplora.export.protection import Remaining, protect, remaining
    from hiplora.export.update import read_update, update_from_model

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
        raise AttributeError(f"module 'hiplora.export' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
