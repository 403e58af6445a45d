"""Several adapters of one base model as one: a rule a file, one registry, exact products."""

from hiplora.merging.merge import merge, save_merged
from hiplora.merging.registry import RULES, Rule

__all__ = ["RULES", "Rule", "merge", "save_merged"]
