"""The paper's formulas (Eq. 1-10) as written: dense, float64, slow and obviously right. For tests only."""

import numpy as np
import torch

from hiplora.spectral import SpectralFactors


def f64(*tensors):
    return tuple(tensor.detach().double() for tensor in tensors)


def dense_svd(weight, k):
    """The k leading singular triplets of a weight by numpy's full SVD."""
    U, sigma, Vt = np.linalg.svd(weight.detach().double().numpy(), full_matrices=False)
    return torch.from_numpy(U[:, :k]), torch.from_numpy(sigma[:k]), torch.from_numpy(Vt[:k].T.copy())


def residual(weight, factors: SpectralFactors):
    """The certificate's definition, one triplet at a time."""
    (W,) = f64(weight)
    U, sigma, V = f64(factors.U, factors.sigma, factors.V)
    if sigma[0] == 0:
        return 0.0
    worst = 0.0
    for i in range(len(sigma)):
        forward = torch.linalg.norm(W @ V[:, i] - sigma[i] * U[:, i])
        backward = torch.linalg.norm(W.T @ U[:, i] - sigma[i] * V[:, i])
        worst = max(worst, forward.item(), backward.item())
    return worst / sigma[0].item()


def orthogonality(factors: SpectralFactors):
    U, V = f64(factors.U, factors.V)
    identity = torch.eye(U.shape[1], dtype=torch.float64)
    return max((U.T @ U - identity).abs().max().item(), (V.T @ V - identity).abs().max().item())


def complement(basis):
    """I - QQᵀ, dense."""
    return torch.eye(basis.shape[0], dtype=torch.float64) - basis.double() @ basis.double().T


def principal_update(U, delta, V):
    """Eq. 2, as a sum of rank-one terms."""
    U, delta, V = f64(U, delta, V)
    return sum(delta[i] * torch.outer(U[:, i], V[:, i]) for i in range(len(delta)))


def residual_update(A, B, U, V, scaling):
    """Eq. 3, with dense projectors."""
    A, B = f64(A, B)
    return scaling * complement(U) @ B @ A @ complement(V)


def update(A, B, delta, U, V, scaling):
    """Eq. 1."""
    return principal_update(U, delta, V) + residual_update(A, B, U, V, scaling)


def effective_weight(weight, A, B, delta, U, sigma, V, scaling):
    """Eq. 8: the rest of the weight, the gains g = σ + δ, the residual channel."""
    W, U, sigma, V, delta = f64(weight, U, sigma, V, delta)
    rest = W - U @ torch.diag(sigma) @ V.T
    return rest + U @ torch.diag(sigma + delta) @ V.T + residual_update(A, B, U, V, scaling)


def weights(sigma, gamma):
    """Eq. 6's weights."""
    powers = [value**gamma for value in sigma.double().tolist()]
    return torch.tensor([power / sum(powers) for power in powers], dtype=torch.float64)


def stability(delta, sigma, gamma):
    """Eq. 6 and 9: R(δ) = Σ w_i δ_i²."""
    delta = delta.double()
    return sum(w * d**2 for w, d in zip(weights(sigma, gamma), delta, strict=True))


def total_loss(task_loss, modules, strength, gamma):
    """Eq. 7 and 10: L_task + λ Σ_modules R(δ); `modules` are pairs (δ, σ)."""
    return task_loss + strength * sum(stability(delta, sigma, gamma) for delta, sigma in modules)


def energy_fractions(update_matrix, U, V):
    """Shares of ‖Δ‖_F² inside span(U) from the left, span(V) from the right, and both."""
    Delta, U, V = f64(update_matrix, U, V)
    P_U, P_V = U @ U.T, V @ V.T
    total = Delta.pow(2).sum()
    return tuple((part.pow(2).sum() / total).item() for part in (P_U @ Delta, Delta @ P_V, P_U @ Delta @ P_V))


def without_inputs(A, moment, k, strength, projection):
    """A factor projected off the k leading eigenvectors of an input moment, with the dense projector or filter."""
    A, C = f64(A, moment)
    identity = torch.eye(len(C), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(C)
    values, vectors = values.flip(0), vectors.flip(1)
    soft = torch.linalg.inv(identity + C / values[k - 1])
    kept = complement(vectors[:, :k]) if projection == "hard" else soft
    return A @ ((1 - strength) * identity + strength * kept)


def output_energy(A, B, inputs):
    """E‖BAx‖² over the rows of `inputs`, one by one."""
    A, B, X = f64(A, B, inputs)
    return sum((B @ (A @ x)).pow(2).sum().item() for x in X) / len(X)
