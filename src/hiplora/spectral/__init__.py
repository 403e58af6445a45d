"""The mathematics of one weight matrix: certified factors, channels, budget, allocation, store."""

from hiplora.spectral.allocation import Allocation, allocate
from hiplora.spectral.basis import SIDES, activation_factors, misfit, protected
from hiplora.spectral.budget import budget_weights, penalty, penalty_gradient, proximal_step
from hiplora.spectral.channels import (
    fused_factors,
    leak,
    principal_delta,
    residual_delta,
    retract,
    soften,
    total_delta,
)
from hiplora.spectral.decompose import truncated_svd
from hiplora.spectral.factors import SpectralFactors, weight_fingerprint
from hiplora.spectral.moments import MomentBasis, SecondMoment
from hiplora.spectral.parts import minor_part, restricted_part
from hiplora.spectral.rank import (
    EXPECTED_RANK,
    RankSpec,
    is_rank,
    parse_rank,
    resolve_rank,
    squared_singular_values,
)
from hiplora.spectral.store import FactorStore

__all__ = [
    "EXPECTED_RANK",
    "SIDES",
    "Allocation",
    "FactorStore",
    "MomentBasis",
    "RankSpec",
    "SecondMoment",
    "SpectralFactors",
    "activation_factors",
    "allocate",
    "budget_weights",
    "fused_factors",
    "is_rank",
    "leak",
    "minor_part",
    "misfit",
    "parse_rank",
    "penalty",
    "penalty_gradient",
    "principal_delta",
    "protected",
    "proximal_step",
    "residual_delta",
    "resolve_rank",
    "restricted_part",
    "retract",
    "soften",
    "squared_singular_values",
    "total_delta",
    "truncated_svd",
    "weight_fingerprint",
]
