"""A merge whose updates are of full rank: each module's is computed when it is asked for."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hiplora.adapters import AdapterUpdate, Pair
from hiplora.merging.options import check_count
from hiplora.merging.registry import Rule
from hiplora.merging.term import DenseTerm, Term
from hiplora.merging.thin import balanced, zero_pair
from hiplora.merging.truncation import TruncatedUpdate
from hiplora.spectral import full_precision, truncated_svd, weight_fingerprint

_NO_WRAP: Callable[[Iterable[str]], Iterable[str]] = iter


@dataclass(frozen=True, eq=False)
class DenseMerge:
    """What a merge by a dense rule adds to its base model.

    Only the adapters' factors are held (`terms`, by module). `delta` forms the update of one module; all of them
    together would be a second model. The other attributes are those of an `AdapterUpdate`.
    """

    base: str
    config: Mapping[str, Any]
    terms: Mapping[str, Sequence[Term]]
    rule: Rule
    options: Any
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    source: str = "merge"
    kind: str = "merged"

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules that the merge changes."""
        return tuple(self.terms)

    def shape(self, module: str) -> tuple[int, int]:
        """Return (m, n) of a module's update: outputs, inputs."""
        A, B = self.terms[module][0].factors
        return B.shape[0], A.shape[1]

    def delta(self, module: str) -> Float[Tensor, "m n"]:
        """Compute the merged update of a module in fp32; it is the caller's.

        It takes the memory of at most one matrix (m, n) per adapter, and some MiB beside.
        """
        with full_precision(torch.device("cpu")):
            return self.rule.combine(self._dense_terms(module), self.options)

    def factors(self, module: str, rank: int) -> tuple[Pair, float]:
        """Return the best factors `(A', B')` of a module's update of at most this rank, and their relative error.

        From a certified truncated SVD of the dense update; the error is ‖B'A' − ΔW‖/‖ΔW‖ (Frobenius).

        Raises:
            ConfigError: rank below 1.
            FactorError: the decomposition missed its tolerance.
        """
        check_count("rank", rank, least=1)
        delta = self.delta(module)
        with full_precision(delta.device):
            norm = torch.linalg.vector_norm(delta).item()
            if not norm:
                return zero_pair(*delta.shape), 0.0
            svd = truncated_svd(delta, min(rank, *delta.shape), name=module, fingerprint="none")
            A, B = balanced(svd.U, svd.sigma, svd.V)
            return (A, B), torch.linalg.vector_norm(delta.addmm_(B, A, alpha=-1)).item() / norm

    def truncated(
        self, rank: int, *, wrap: Callable[[Iterable[str]], Iterable[str]] = _NO_WRAP
    ) -> TruncatedUpdate:
        """Return the merge as a low-rank update, every module cut down to `rank`, with the errors.

        Args:
            rank: R, at least 1.
            wrap: called with the module names, yields them; for a progress bar.

        Raises:
            ConfigError, FactorError: as `factors`.
        """
        cut = {module: self.factors(module, rank) for module in wrap(list(self.modules))}
        plain = AdapterUpdate(
            self.base,
            self.kind,
            self.config,
            {module: pair for module, (pair, _) in cut.items()},
            self.fingerprints,
            self.extras,
            source=self.source,
        )
        errors = {module: error for module, (_, error) in cut.items()}
        return TruncatedUpdate(**vars(plain), cut_to=rank, errors=errors)

    def check_leak(self) -> None:
        """Do nothing: the adapters were checked when they were merged, and a dense update promises no complement."""

    def _dense_terms(self, module: str) -> Iterator[DenseTerm]:
        for term in self.terms[module]:
            A, B = term.factors
            key = f"{module} {weight_fingerprint(A)} {weight_fingerprint(B)}"
            yield DenseTerm(B @ A, term.weight, key)
