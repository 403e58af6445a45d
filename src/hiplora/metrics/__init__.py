"""What the numbers mean: the paper's metrics and honest intervals, as pure functions over numbers and numpy arrays."""

from hiplora.metrics.bootstrap import BootstrapResult, Interval, paired_bootstrap
from hiplora.metrics.continual import average_accuracy, backward_transfer, forgetting, learned_accuracy
from hiplora.metrics.drift import kl_drift, per_token, perplexity_ratio
from hiplora.metrics.editing import Locality, edit_preferred, edit_success, locality
from hiplora.metrics.instances import MergeInstance, merge_instances
from hiplora.metrics.likelihood import answer_likelihood, gold_probability
from hiplora.metrics.merging import (
    DEFAULT_TAU,
    DEFAULT_TAUS,
    mean_post_merge_drop,
    merge_fail,
    merge_fail_table,
    merge_failures,
)
from hiplora.metrics.passing import pass_at_k
from hiplora.metrics.retention import retain
from hiplora.metrics.sign_flip import sign_flip_p_value

__all__ = [
    "DEFAULT_TAU",
    "DEFAULT_TAUS",
    "BootstrapResult",
    "Interval",
    "Locality",
    "MergeInstance",
    "answer_likelihood",
    "average_accuracy",
    "backward_transfer",
    "edit_preferred",
    "edit_success",
    "forgetting",
    "gold_probability",
    "kl_drift",
    "learned_accuracy",
    "locality",
    "mean_post_merge_drop",
    "merge_fail",
    "merge_fail_table",
    "merge_failures",
    "merge_instances",
    "paired_bootstrap",
    "pass_at_k",
    "per_token",
    "perplexity_ratio",
    "retain",
    "sign_flip_p_value",
]
