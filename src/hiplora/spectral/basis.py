"""Bases of the protected subspaces: which sides are protected, and the basis of what a layer computes."""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from hiplora.errors import FactorError
from hiplora.spectral.decompose import certify, check_request
from hiplora.spectral.factors import SpectralFactors, Triplets, weight_fingerprint
from hiplora.spectral.moments import MomentBasis
from hiplora.spectral.precision import full_precision, widest

SIDES = ("both", "input", "output")


def protected(
    U: Float[Tensor, "m k"], V: Float[Tensor, "n k"], sides: str
) -> tuple[Float[Tensor, "m p"], Float[Tensor, "n q"]]:
    """Return the parts of U and V that the residual channel must keep out of; a free side has no column."""
    return U if sides != "input" else U[:, :0], V if sides != "output" else V[:, :0]


def misfit(
    weight: Float[Tensor, "m n"],
    U: Float[Tensor, "m k"],
    sigma: Float[Tensor, " k"],
    V: Float[Tensor, "n k"],
    basis: str = "weight",
) -> float:
    """Return how far factors are from being a weight's, in units of σ_1: about 0 for its own, about 1 for another's.

    Singular triplets satisfy `Wv_i = σ_i u_i` and `Wᵀu_i = σ_i v_i`; those of the activation basis only make `UᵀWV`
    diagonal.
    """
    if basis == "weight":
        off = torch.maximum((weight @ V - U * sigma).norm(dim=0), (weight.T @ U - V * sigma).norm(dim=0))
    else:
        off = (U.T @ weight @ V - sigma.diag()).norm(dim=0)
    return (off.max() / sigma[0]).item() if sigma[0] > 0 else off.max().item()


def activation_factors(
    weight: Float[Tensor, "m n"],
    inputs: MomentBasis,
    k: int,
    sides: str = "input",
    outputs: MomentBasis | None = None,
    *,
    name: str = "weight",
    fingerprint: str | None = None,
) -> SpectralFactors:
    """Return the factors of a weight in the basis of what it really computes.

    V spans the k leading eigenvectors of the input second moment C. U spans the images of V where only the input
    side is protected, so that `Wv_i = σ_i u_i` exactly; else the k leading eigenvectors of `outputs`, the second
    moment G of the gradients at the layer's output: to second order the KL divergence that an update ΔW
    causes is `½ E[(gᵀΔWx)²]`, which K-FAC's assumption makes `½ tr(GΔWCΔWᵀ)`, so these are the outputs that the
    model's predictions depend on. Both are rotated inside their subspaces so that `UᵀWV` is diagonal, with `σ_i ≥ 0`
    in descending order: a gain δ_i is the change of one number, as in Eq. 2.

    Raises:
        FactorError: shapes do not fit, k exceeds min(m, n) or the eigenvectors given, or a value is not finite.
    """
    check_request(weight, k, name)
    shape = outputs.vectors.shape if outputs is not None else (0, 0)
    if sides != "input" and (shape[0] != weight.shape[0] or shape[1] < k):
        given = f"{shape[1]} of {shape[0]} numbers" if outputs is not None else "none"
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
            U = outputs.vectors[:, :k].to(wide)
        P, sigma, Qt = torch.linalg.svd(U.T @ wide @ V)
        factors = certify(matrix, Triplets(U @ P, sigma, V @ Qt.T), "eigen")
        shrink_U = _shrink(outputs, factors.U) if sides != "input" and outputs is not None else None
        shrink_V = _shrink(inputs, factors.V) if sides != "output" else None
    return dataclasses.replace(
        factors,
        basis=f"activation:{sides}",
        fingerprint=fingerprint or weight_fingerprint(weight),
        shrink_U=shrink_U,
        shrink_V=shrink_V,
    )


def _shrink(moment: MomentBasis, directions: Float[Tensor, "n k"]) -> Float[Tensor, "k k"]:
    """Return the soft projection's `Qᵀ diag(λ_i/(λ_i + λ_k)) Q` in a basis rotated by Q; λ_i = 0 is no filter."""
    k = directions.shape[1]
    wide = directions.to(widest(directions.device))
    rotation = moment.vectors[:, :k].to(wide).T @ wide
    return (rotation.T * moment.soft_shares(k)[:k].to(wide) @ rotation).float()
