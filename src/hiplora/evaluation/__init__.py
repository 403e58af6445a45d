"""What an adapter learned and what it disturbed: benchmark scores, drift from the base, response loss, answers."""

from hiplora.evaluation.drift import BaseReference, Drift, measure_drift
from hiplora.evaluation.likelihood import Encoded, encode, heldout_loss, response_log_probs

__all__ = [
    "BaseReference",
    "Drift",
    "Encoded",
    "encode",
    "heldout_loss",
    "measure_drift",
    "response_log_probs",
]
