"""Bases of the protected subspaces: which sides are protected, and the basis of what a layer computes."""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from hiplora.errors import FactorError
from hiplora.spectral.decompose import certify, check_request
from hiplora.spectral.factors import SpectralFactors, Triplets, weight_fingerprint
from hiplora.spectral.moments import InputBasis
from hiplora.spectral.precision import full_precision, widest

SIDES = ("both", "input", "output")


def chosen_sides(basis: str, given: str | None) -> str:
    """Return the sides to protect: those given, else the paper's "both", or "input" for the activation basis."""
    return given or ("input" if basis == "activation" else "both")


def protected(
    U: Float[Tensor, "m k"], V: Float[Tensor, "n k"], sides: str
) -> tuple[Float[Tensor, "m p"], Float[Tensor, "n q"]]:
    """Return the parts of U and V that the residual channel must keep out of; a free side has no column."""
    return U if sides != "input" else U[:, :0], V if sides != "output" else V[:, :0]


def activation_factors(
    weight: Float[Tensor, "m n"],
    inputs: InputBasis,
    k: int,
    sides: str = "input",
    *,
    name: str = "weight",
    fingerprint: str | None = None,
) -> SpectralFactors:
    """Return the factors of a weight in the basis of the inputs that it really gets.

    V spans the k leading eigenvectors of the input second moment C. U spans the images of V where only the input
    side is protected, so that `Wv_i = σ_i u_i` exactly; else the k leading left singular vectors of `W C^½`, the
    directions of the outputs that the layer really gives. Both are rotated inside their subspaces so that `UᵀWV`
    is diagonal, with `σ_i ≥ 0` in descending order: a gain δ_i is the change of one number, as in Eq. 2.

    Raises:
        FactorError: shapes do not fit, k exceeds min(m, n) or the eigenvectors kept, or a value is not finite.
    """
    check_request(weight, k, name)
    if weight.shape[1] != inputs.vectors.shape[0]:
        raise FactorError(
            f"layer {name}: the weight takes {weight.shape[1]} inputs, the calibration has {inputs.vectors.shape[0]}; "
            "calibrate on this very model"
        )
    if k > inputs.vectors.shape[1]:
        raise FactorError(
            f"layer {name}: principal_rank {k} exceeds the {inputs.vectors.shape[1]} eigenvectors that are kept; "
            "lower it"
        )
    matrix = weight.detach().to(torch.float32)
    if not torch.isfinite(matrix).all():
        raise FactorError(
            f"layer {name}: the weight has NaN or Inf; the checkpoint is damaged or out of range"
        )
    with full_precision(matrix.device):
        wide = matrix.to(widest(matrix.device))
        vectors = inputs.vectors.to(wide)
        V = vectors[:, :k]
        if sides == "input":
            U = torch.linalg.svd(wide @ V, full_matrices=False).U
        else:
            image = wide @ (vectors * inputs.values[: vectors.shape[1]].to(wide).sqrt())
            U = torch.linalg.eigh(image @ image.T).eigenvectors.flip(1)[:, :k]
        P, sigma, Qt = torch.linalg.svd(U.T @ wide @ V)
        factors = certify(matrix, Triplets(U @ P, sigma, V @ Qt.T), "eigen")
    return dataclasses.replace(
        factors, basis=f"activation:{sides}", fingerprint=fingerprint or weight_fingerprint(weight)
    )
