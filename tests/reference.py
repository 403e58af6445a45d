"""The paper's formulas (Eq. 1-10) as written: dense, float64, slow and obviously right. For tests only."""

import math

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


def column_projector(matrix, tolerance):
    """Dense projector onto the column space, of the singular directions above `tolerance` of the largest."""
    U, sigma, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    kept = U[:, (sigma > tolerance * sigma[0]) & (sigma > 0)]
    return kept @ kept.T


def overlap(one, other, tolerance):
    """Mean and largest squared cosine of the angles between two column spaces, from their projectors."""
    P, Q = column_projector(one, tolerance), column_projector(other, tolerance)
    smaller = min(round(P.trace().item()), round(Q.trace().item()))
    return (P @ Q).trace().item() / smaller, torch.linalg.eigvals(P @ Q @ P).real.max().item()


def cancelled_share(updates):
    """Share of the magnitude that meets its like of the other sign: entry by entry, twice the smaller side."""
    lost = total = 0.0
    for entries in zip(*(update.double().flatten().tolist() for update in updates), strict=True):
        up, down = sum(e for e in entries if e > 0), -sum(e for e in entries if e < 0)
        lost, total = lost + 2 * min(up, down), total + up + down
    return lost / total


def without_small_entries(update, density):
    """An update with all but its largest entries set to zero: the first ⌊density · mn⌋ of them, sorted."""
    (update,) = f64(update)
    flat, kept = update.flatten(), torch.zeros(update.numel(), dtype=torch.float64)
    for place in flat.abs().argsort(descending=True)[: int(density * len(flat))]:
        kept[place] = flat[place]
    return kept.view(update.shape)


def ties(updates, weights, density, scale=1.0):
    """Trim, elect, and average what agrees: entry by entry."""
    trimmed = [without_small_entries(update, density) for update in updates]
    merged = torch.zeros_like(trimmed[0])
    for i in range(merged.shape[0]):
        for j in range(merged.shape[1]):
            sign = 1.0 if sum(part[i, j] for part in trimmed) >= 0 else -1.0
            agreeing = [w * p[i, j] for w, p in zip(weights, trimmed, strict=True) if p[i, j] * sign > 0]
            merged[i, j] = scale * sum(agreeing) / max(1, len(agreeing))
    return merged


def nonzero_svd(update):
    """The singular triplets of a dense update that are not zero but for rounding."""
    U, sigma, Vt = torch.linalg.svd(update.double(), full_matrices=False)
    kept = sigma > 1e-6 * sigma[0]
    return U[:, kept], sigma[kept], Vt[kept]


def knots(updates, weights, density, scale=1.0):
    """SVD of the dense updates side by side, TIES on the blocks of Σ Vᵀ, multiplied back."""
    U, sigma, Vt = nonzero_svd(torch.cat(f64(*updates), dim=1))
    blocks = (torch.diag(sigma) @ Vt).split(updates[0].shape[1], dim=1)
    return U @ ties(blocks, weights, density, scale)


def tsv(updates, weights, counts):
    """Leading singular triplets of each dense update, their vectors orthogonalised by the polar factor."""
    parts = [nonzero_svd(update) for update in updates]
    U = torch.cat([U[:, :k] for (U, _, _), k in zip(parts, counts, strict=True)], dim=1)
    V = torch.cat([Vt[:k].T for (_, _, Vt), k in zip(parts, counts, strict=True)], dim=1)
    sigma = torch.cat([w * s[:k] for (_, s, _), w, k in zip(parts, weights, counts, strict=True)])

    def polar(X):
        values, vectors = torch.linalg.eigh(X.T @ X)
        inverse = torch.where(values > 1e-8, values.clamp_min(1e-300).rsqrt(), 0.0)
        return X @ vectors @ torch.diag(inverse) @ vectors.T

    return polar(U) @ torch.diag(sigma) @ polar(V).T


def iso_c(updates, weights):
    """The singular directions of the sum, each with the mean singular value."""
    U, sigma, Vt = nonzero_svd(sum(w * u for w, u in zip(weights, f64(*updates), strict=True)))
    return sigma.mean() * U @ Vt


@torch.no_grad()
def drift(base, model, windows):
    """KL a token from the base, ratio of perplexities, share of greedy tokens that changed, and tokens, in float64."""
    kl, change, changed, tokens = 0.0, 0.0, 0, 0
    for ids in windows:
        p, q = (m(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1) for m in (base, model))
        kl += (p.exp() * (p - q)).sum().item()
        change += (p - q).gather(1, ids[1:, None]).sum().item()
        changed += (p.argmax(-1) != q.argmax(-1)).sum().item()
        tokens += len(ids) - 1
    return kl / tokens, math.exp(change / tokens), changed / tokens, tokens


@torch.no_grad()
def answer_log_prob(model, tokenizer, prompt, answer):
    """log p(answer | prompt), from the logits of this row alone; a token a byte, so that the two do not merge."""
    given, whole = (tokenizer(text)["input_ids"] for text in (prompt, prompt + answer))
    log_probs = model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(log_probs[place - 1, whole[place]].item() for place in range(len(given), len(whole)))
