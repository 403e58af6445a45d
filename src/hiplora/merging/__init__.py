"""Several adapters of one base model as one: a rule a file, one registry, exact products."""

import importlib
from typing import TYPE_CHECKING, Any

from hiplora.merging.registry import RULES, Rule

if TYPE_CHECKING:
    from hiplora.merging.merger import merge, save_merged

__all__ = ["RULES", "Rule", "merge", "save_merged"]


def __getattr__(name: str) -> Any:
    """Load merging itself on first use: naming the rules needs no torch."""
    if name in ("merge", "save_merged"):
        return getattr(importlib.import_module("hiplora.merging.merger"), name)
    raise AttributeError(f"module 'hiplora.merging' has no attribute {name!r}")
