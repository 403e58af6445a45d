"""The paper's metrics and honest intervals: pure functions over numbers and numpy arrays."""

from hiplora.metrics.bootstrap import (
    BootstrapResult,
    Interval,
    MergeInstance,
    merge_instances,
    paired_bootstrap,
    resample_counts,
    sign_flip_p_value,
    student_margin,
)
from hiplora.metrics.scores import (
    CONTINUAL,
    DEFAULT_TAU,
    DEFAULT_TAUS,
    Locality,
    answer_likelihood,
    average_accuracy,
    backward_transfer,
    falls_below,
    forgetting,
    gold_probability,
    learned_accuracy,
    locality,
    mean_post_merge_drop,
    merge_fail,
    pass_at_k,
    retain,
)
