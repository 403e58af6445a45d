"""Several adapters of one base model as one: decorated rules in one registry, exact products in factor space.

`RULES` needs no torch, so that the command line can list the rules; everything else is loaded on first use.
"""

import importlib
from typing import Any

from hiplora.merging.rules import RULES, Rule, find_rule


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    home = importlib.import_module(f"hiplora.merging.{'conflict' if name == 'merge_report' else 'merger'}")
    if not hasattr(home, name):
        raise AttributeError(f"module 'hiplora.merging' has no attribute {name!r}")
    return getattr(home, name)
