"""The certified factors of one weight matrix, its fingerprint, and the precision that everything is computed in."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hiplora.errors import FactorError

_SAMPLED = 1 << 15  # values of a weight by which it is recognised
_CHUNK_ELEMENTS = 1 << 22  # copies in another dtype are made a few MiB at a time, whatever the weight's size


class Triplets(NamedTuple):
    """Uncertified singular triplets: U (m, k), sigma (k,) descending, V (n, k)."""

    U: Tensor
    sigma: Tensor
    V: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class SpectralFactors:
    """Truncated singular value decomposition `W ≈ U diag(σ) Vᵀ` with its certificate.

    U (m, k) and V (n, k) have orthonormal columns, σ (k,) is descending; all are fp32. `residual` is
    `max_i max(‖Wv_i − σ_i u_i‖, ‖Wᵀu_i − σ_i v_i‖) / σ_1`, measured on these very tensors in float64 (0 for an
    all-zero weight); `orthogonality` is `max |UᵀU − I|, |VᵀV − I|`; `method` the one used in the end; `fingerprint`
    the factored weight's. `shrink_U` and `shrink_V` (k, k) are the soft projection's filters (`soften`), of the
    activation basis only.
    """

    U: Float[Tensor, "m k"]
    sigma: Float[Tensor, " k"]
    V: Float[Tensor, "n k"]
    residual: float
    orthogonality: float
    method: str
    basis: str = "weight"
    fingerprint: str = ""
    shrink_U: Float[Tensor, "k k"] | None = None
    shrink_V: Float[Tensor, "k k"] | None = None

    @property
    def rank(self) -> int:
        """Number of singular triplets, k."""
        return self.sigma.shape[0]

    def to(self, device: torch.device | str) -> "SpectralFactors":
        """Return the same factors with their tensors on `device`."""
        tensors = {name: getattr(self, name) for name in ("U", "sigma", "V", "shrink_U", "shrink_V")}
        return dataclasses.replace(self, **{n: t.to(device) for n, t in tensors.items() if t is not None})


def check_values(weight: Tensor, name: str) -> None:
    """Raise FactorError where a layer's weight is a shape only: not loaded yet, or offloaded."""
    if weight.is_meta:
        raise FactorError(
            f"layer {name}: the weight is on the meta device and has no values; load the model first, with nothing "
            "offloaded (device_map)"
        )


def weight_fingerprint(weight: Tensor, name: str = "") -> str:
    """Return the SHA-256 of a tensor's shape and float32 values, whatever its dtype, layout, device and machine."""
    check_values(weight, name)
    digest = hashlib.sha256(repr(tuple(weight.shape)).encode())
    weight = weight.detach()
    for rows in row_chunks(weight if weight.dim() else weight.reshape(1)):
        values = rows.to(device="cpu", dtype=torch.float32).contiguous().numpy()
        digest.update(values.astype("<f4", copy=False).data)
    return digest.hexdigest()


def weight_sample(weight: Float[Tensor, "m n"], name: str = "") -> str:
    """Return the SHA-256 of a weight's shape and of some of its float32 values, from two diagonals or more.

    They are `_SAMPLED` values, or all of a small weight's, and some of every row and column. So it costs little, and
    tells weights apart that training, merging or rounding changed; a change of single values may not show.
    """
    check_values(weight, name)
    tall = weight.detach() if len(weight) >= weight.shape[1] else weight.detach().T
    rows, n = torch.arange(len(tall), device=tall.device)[:, None], tall.shape[1]
    diagonals = min(n, max(2, _SAMPLED // len(tall)))
    shifts = torch.arange(diagonals, device=tall.device) * n // diagonals
    values = tall[rows, (rows + shifts) % n].to(device="cpu", dtype=torch.float32).numpy().astype("<f4", copy=False)
    return hashlib.sha256(repr(tuple(weight.shape)).encode() + values.tobytes()).hexdigest()


def row_chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Cut a tensor along its first dimension into blocks small enough to copy; an empty one has none."""
    if tensor.numel():
        yield from tensor.split(max(1, _CHUNK_ELEMENTS * tensor.shape[0] // tensor.numel()))


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute without gradients, autocast, TF32 or bf16 shortcuts inside the block: they leave products ten bits."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def widest(device: torch.device) -> torch.dtype:
    """float64, except on the one kind of device that has none (Apple's)."""
    return torch.float32 if device.type == "mps" else torch.float64
