"""Matrices with a spectrum of one's choice."""

import torch


def with_spectrum(sigma, rows, columns, seed=0):
    """A (rows, columns) matrix with the given singular values and random singular vectors, fp32."""
    generator = torch.Generator().manual_seed(seed)
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    left = torch.randn(rows, len(sigma), generator=generator, dtype=torch.float64)
    right = torch.randn(columns, len(sigma), generator=generator, dtype=torch.float64)
    U, V = torch.linalg.qr(left).Q, torch.linalg.qr(right).Q
    return ((U * sigma) @ V.T).float()


def power_law(rows, columns, exponent=0.5, seed=0):
    """Singular values i^-exponent, like the weights of a trained model."""
    size = min(rows, columns)
    return with_spectrum(torch.arange(1, size + 1, dtype=torch.float64) ** -exponent, rows, columns, seed)


def gaussian(rows, columns, seed=0):
    """A random matrix: the flattest spectrum that one meets."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
