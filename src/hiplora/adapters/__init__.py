"""Adapters as plain updates: read, inspect, project and export them."""

from hiplora.adapters.base import (
    BaseWeights,
    check_base,
    is_transposed,
    linear_layer,
    load_base,
    quiet_loading,
)
from hiplora.adapters.check import compare_modules, refuse_over
from hiplora.adapters.dense import save_dense
from hiplora.adapters.inspection import allocation_rows, energy_shares, inspect_adapter
from hiplora.adapters.lora import SELECTION, open_update, save_as_lora, write_lora
from hiplora.adapters.native import save_as_hiplora
from hiplora.adapters.output import ExportReport, check_out
from hiplora.adapters.protection import check_projection, protect, remaining, totals
from hiplora.adapters.read import WEIGHTS, read_update, update_from_model
from hiplora.adapters.servers import server_findings
from hiplora.adapters.update import AdapterUpdate, Channels, Pair, model_order, module_place, product_norm

__all__ = [
    "SELECTION",
    "WEIGHTS",
    "AdapterUpdate",
    "BaseWeights",
    "Channels",
    "ExportReport",
    "Pair",
    "allocation_rows",
    "check_base",
    "check_out",
    "check_projection",
    "compare_modules",
    "energy_shares",
    "inspect_adapter",
    "is_transposed",
    "linear_layer",
    "load_base",
    "model_order",
    "module_place",
    "open_update",
    "product_norm",
    "protect",
    "quiet_loading",
    "read_update",
    "refuse_over",
    "remaining",
    "save_as_hiplora",
    "save_as_lora",
    "save_dense",
    "server_findings",
    "totals",
    "update_from_model",
    "write_lora",
]
