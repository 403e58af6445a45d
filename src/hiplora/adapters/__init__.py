"""Adapters as plain updates: read, inspect, project and export them."""

from hiplora.adapters.base import BaseWeights, is_transposed, linear_layer, load_for, quiet_loading
from hiplora.adapters.check import compare_modules, refuse_over
from hiplora.adapters.dense import save_dense
from hiplora.adapters.folder import WEIGHTS, read_folder
from hiplora.adapters.inspection import allocation_rows, energy_shares, inspect_adapter
from hiplora.adapters.lora import open_update, save_as_hiplora, save_as_lora, write_lora
from hiplora.adapters.output import has_words, push_to_hub, server_findings
from hiplora.adapters.protection import check_projection, protect, remaining
from hiplora.adapters.read import attached, read_update, update_from_model
from hiplora.adapters.update import AdapterUpdate, Channels, Pair, model_order, module_place, product_norm
