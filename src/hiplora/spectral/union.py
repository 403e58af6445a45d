"""Protected subspaces united: what was protected before, and what a later measurement adds."""

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hiplora.spectral.factors import SpectralFactors, Triplets, full_precision, weight_fingerprint, widest
from hiplora.spectral.svd import certify

_INSIDE = 1e-4  # of a unit vector: what lies outside by less than this counts as inside


def unite(bases: Sequence[Float[Tensor, "n _"]], rank: int) -> Float[Tensor, "n k"]:
    """Return an orthonormal basis of the sum of subspaces, given by orthonormal bases; at most `rank` directions.

    The first basis comes whole, then of each further one the directions that lie furthest outside what is there.
    """
    with full_precision(bases[0].device):
        found = bases[0].to(widest(bases[0].device))
        for basis in bases[1:]:
            outside = basis.to(found) - found @ (found.T @ basis.to(found))
            directions, lengths, _ = torch.linalg.svd(outside, full_matrices=False)
            found = torch.cat([found, directions[:, lengths > _INSIDE]], dim=1)
        return torch.linalg.qr(found[:, :rank]).Q.to(bases[0])


def united_factors(
    weight: Float[Tensor, "m n"],
    before: tuple[Float[Tensor, "m k"], Float[Tensor, "n k"]],
    later: SpectralFactors,
) -> SpectralFactors:
    """Return the factors of a weight that protect the directions (U, V) of `before` and those of `later`.

    Both sides get as many directions, at most half of min(m, n), so that a complement to learn in is left. As in
    `activation_factors`, the pairs are rotated inside their subspaces so that `UᵀWV` is diagonal.
    """
    m, n = weight.shape
    most = max(later.rank, before[0].shape[1], min(m, n) // 2)
    U, V = (unite([old, new.to(old)], most) for old, new in zip(before, (later.U, later.V), strict=True))
    k = min(U.shape[1], V.shape[1])
    with full_precision(weight.device):
        wide = weight.to(widest(weight.device))
        U, V = U[:, :k].to(wide), V[:, :k].to(wide)
        P, sigma, Qt = torch.linalg.svd(U.T @ wide @ V)
        factors = certify(weight, Triplets(U @ P, sigma, V @ Qt.T), "union")
    return dataclasses.replace(factors, basis=later.basis, fingerprint=weight_fingerprint(weight))
