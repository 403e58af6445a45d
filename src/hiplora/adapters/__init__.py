"""Adapters as plain updates: read, inspect, project and export them."""

from hiplora.adapters.base import BaseWeights, check_base, is_transposed, load_base, quiet_loading
from hiplora.adapters.check import compare_modules, refuse_over
from hiplora.adapters.dense import merge_into, save_dense
from hiplora.adapters.inspection import allocation_rows, energy_shares, inspect_adapter, summarise
from hiplora.adapters.lora import SELECTION, open_update, save_as_lora, write_lora
from hiplora.adapters.native import save_as_hiplora
from hiplora.adapters.output import ExportReport, check_out
from hiplora.adapters.protection import check_projection, check_widths, protect, remaining, totals
from hiplora.adapters.read import WEIGHTS, read_update, update_from_model
from hiplora.adapters.servers import Finding, server_findings
from hiplora.adapters.update import AdapterUpdate, Channels, Pair, Update, product_norm

__all__ = [
    "SELECTION",
    "WEIGHTS",
    "AdapterUpdate",
    "BaseWeights",
    "Channels",
    "ExportReport",
    "Finding",
    "Pair",
    "Update",
    "allocation_rows",
    "check_base",
    "check_out",
    "check_projection",
    "check_widths",
    "compare_modules",
    "energy_shares",
    "inspect_adapter",
    "is_transposed",
    "load_base",
    "merge_into",
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
    "summarise",
    "totals",
    "update_from_model",
    "write_lora",
]
