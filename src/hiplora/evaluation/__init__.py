"""What an adapter learned and what it disturbed: benchmark scores, drift from the base, response loss, answers."""

from hiplora.evaluation.drift import BaseReference, Drift, measure_drift
from hiplora.evaluation.likelihood import Encoded, encode, heldout_loss, response_log_probs
