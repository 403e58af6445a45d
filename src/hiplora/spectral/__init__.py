"""The mathematics of one weight matrix: certified factors, channels, budget, activation basis, and their store."""

from hiplora.spectral.activation import MAX_VECTORS, MomentBasis, SecondMoment, activation_factors
from hiplora.spectral.cache import FactorStore, TensorStore
from hiplora.spectral.channels import (
    SIDES,
    Allocation,
    allocate,
    budget_weights,
    fused_factors,
    leak,
    penalty,
    penalty_gradient,
    protected,
    proximal_step,
    retract,
    soften,
)
from hiplora.spectral.factors import SpectralFactors, full_precision, weight_fingerprint, weight_sample
from hiplora.spectral.rank import (
    EXPECTED_RANK,
    RankSpec,
    is_rank,
    parse_rank,
    rank_for_energy,
    resolve_rank,
    squared_singular_values,
)
from hiplora.spectral.svd import factor_mismatch, minor_svd_factors, projected_factors, truncated_svd
