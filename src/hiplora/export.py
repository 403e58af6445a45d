"""The former name of `hiplora.adapters`: `hiplora.export.save_as_lora` stays importable."""

from hiplora.adapters import (
    AdapterUpdate,
    Channels,
    inspect_adapter,
    read_update,
    save_as_hiplora,
    save_as_lora,
    save_dense,
    update_from_model,
)

__all__ = [
    "AdapterUpdate",
    "Channels",
    "inspect_adapter",
    "read_update",
    "save_as_hiplora",
    "save_as_lora",
    "save_dense",
    "update_from_model",
]
