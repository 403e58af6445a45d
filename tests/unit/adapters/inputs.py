"""Inputs of a layer, with an update that reads them."""

import torch

from hiplora.spectral import SecondMoment


class Case:
    """Inputs x (T, n) with strong and weak directions, and the factors of an update that reads them."""

    def __init__(self, n, q, m, tokens, seed):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        mixing = torch.linalg.qr(draw(n, n)).Q
        self.x = draw(tokens, n) * torch.logspace(0.7, -0.7, n) @ mixing
        self.A, self.B = draw(q, n), draw(m, q)
        self.moment = self.x.double().T @ self.x.double() / tokens
        self.name = f"Case({n}, {q}, {m}, {tokens}, {seed})"

    def __repr__(self):
        return self.name

    @property
    def inputs(self):
        moment = SecondMoment(self.x.shape[1])
        moment.add(self.x)
        return moment.eigen()
