"""Several adapters of one base model as one: a rule a file, one registry, exact products."""

import importlib
from typing import TYPE_CHECKING, Any

from hiplora.merging.registry import RULES, Rule

if TYPE_CHECKING:
    from hiplora.merging.dense_merge import DenseMerge
    from hiplora.merging.merger import merge, save_merged
    from hiplora.merging.truncation import TruncatedUpdate, truncate

_LAZY = {
    "DenseMerge": "hiplora.merging.dense_merge",
    "TruncatedUpdate": "hiplora.merging.truncation",
    "merge": "hiplora.merging.merger",
    "save_merged": "hiplora.merging.merger",
    "truncate": "hiplora.merging.truncation",
}

__all__ = ["RULES", "DenseMerge", "Rule", "TruncatedUpdate", "merge", "save_merged", "truncate"]


def __getattr__(name: str) -> Any:
    """Load merging itself on first use: naming the rules needs no torch."""
    if name not in _LAZY:
        raise AttributeError(f"module 'hiplora.merging' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
