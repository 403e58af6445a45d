"""Random updates of one module, as thin factors and as matrices."""

import torch

from hiplora.adapters import Channels
from hiplora.merging.rules import Term
from hiplora.spectral import retract

M, N, K = 7, 9, 3


def basis(seed, m=M, n=N, k=K):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.linalg.qr(torch.randn(size, k, generator=generator)).Q for size in (m, n))


def hip_term(seed, weight=1.0, basis_seed=0, gains=True, rank=None):
    """A HiP-LoRA term; those of one `basis_seed` share their directions."""
    generator = torch.Generator().manual_seed(100 + seed)
    U, V = basis(basis_seed)
    rank = rank or 1 + seed % 3
    A, B = retract(torch.randn(rank, N, generator=generator), torch.randn(M, rank, generator=generator), U, V)
    delta = torch.randn(K, generator=generator) if gains else None
    channels = Channels(A, B, U, torch.arange(K, 0, -1.0), V, delta, scaling=1.5, leak_limit=1e-4)
    return Term(channels.factors(), weight, channels)


def lora_term(seed, weight=1.0, m=M, n=N, rank=None):
    generator = torch.Generator().manual_seed(200 + seed)
    rank = rank or 1 + seed % 4
    return Term((torch.randn(rank, n, generator=generator), torch.randn(m, rank, generator=generator)), weight)


def make(kind, seed, weight):
    """A term of one of the kinds "lora", "shared", "elsewhere" and "proj"."""
    if kind == "lora":
        return lora_term(seed, weight)
    return hip_term(seed, weight, basis_seed=1 if kind == "elsewhere" else 0, gains=kind != "proj")


def dense(pair):
    A, B = pair
    return B.double() @ A.double()


def expected_sum(terms):
    return sum(term.weight * dense(term.factors) for term in terms)


def matrices(terms):
    return [dense(term.factors) for term in terms]


def weights(terms):
    return [term.weight for term in terms]
