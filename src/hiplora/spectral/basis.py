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
    """Return the sides to protect: those given, else both."""
    return given or "both"


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
    outputs: Float[Tensor, "m q"] | None = None,
    *,
    name: str = "weight",
    fingerprint: str | None = None,
) -> SpectralFactors:
    """Return the factors of a weight in the basis of what it really computes.

    V spans the k leading eigenvectors of the input second moment C. U spans the images of V where only the input
    side is protected, so that `Wv_i = σ_i u_i` exactly; else the first k of `outputs`, the leading eigenvectors of
    the second moment of the gradients at the layer's output: to second order the KL divergence that an update ΔW
    causes is `½ E[(gᵀΔWx)²]`, which K-FAC's assumption makes `½ tr(GΔWCΔWᵀ)`, so these are the outputs that the
    model's predictions depend on. Both are rotated inside their subspaces so that `UᵀWV` is diagonal, with `σ_i ≥ 0`
    in descending order: a gain δ_i is the change of one number, as in Eq. 2.

    Raises:
        FactorError: shapes do not fit, k exceeds min(m, n) or the eigenvectors given, or a value is not finite.
    """
    check_request(weight, k, name)
    if sides != "input" and (outputs is None or outputs.shape[0] != weight.shape[0] or outputs.shape[1] < k):
        given = "none" if outputs is None else f"{outputs.shape[1]} of {outputs.shape[0]} numbers"
        raise FactorError(
            f"layer {name}: protecting {sides} sides takes {k} directions of its {weight.shape[0]} outputs, and there "
            f"are {given}; calibrate on this very model"
        )
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
        V = inputs.vectors[:, :k].to(wide)
        if sides == "input" or outputs is None:
            U = torch.linalg.svd(wide @ V, full_matrices=False).U
        else:
            U = outputs[:, :k].to(wide)
        P, sigma, Qt = torch.linalg.svd(U.T @ wide @ V)
        factors = certify(matrix, Triplets(U @ P, sigma, V @ Qt.T), "eigen")
    return dataclasses.replace(
        factors, basis=f"activation:{sides}", fingerprint=fingerprint or weight_fingerprint(weight)
    )
