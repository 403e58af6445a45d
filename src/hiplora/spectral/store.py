"""A content-addressed, crash-safe store of factors on disk."""

import contextlib
import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import filelock
import platformdirs
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from hiplora.errors import StoreError
from hiplora.files import write_atomic
from hiplora.spectral.decompose import truncated_svd
from hiplora.spectral.factors import SpectralFactors, weight_fingerprint

logger = logging.getLogger(__name__)

FORMAT = (
    1  # raised whenever the decomposition or the file layout changes: old entries are then simply not found
)
_LOCK_SECONDS = 3600.0
_TENSORS = ("U", "sigma", "V")


def default_root() -> Path:
    """Return the folder of the user's store: `$HIPLORA_CACHE/factors`, or the platform's cache folder."""
    base = os.environ.get("HIPLORA_CACHE") or platformdirs.user_cache_dir("hiplora")
    return Path(base).expanduser() / "factors"


class FactorStore:
    """Factors kept on disk under the fingerprint of their weight and the options that made them.

    An entry is written aside and renamed, so it is whole or absent; one process computes while the others
    wait; everything is verified when it is read, and a damaged entry is reported and computed again. A
    store that cannot be written costs a warning and the time to compute, unless `must_write` says that
    filling it is the purpose.
    """

    def __init__(self, root: str | os.PathLike | None = None, *, must_write: bool = False):
        self.root = Path(root) if root is not None else default_root()
        self.must_write = must_write

    def get_or_compute(
        self, weight: Tensor, k: int, tol: float = 1e-4, method: str = "auto", *, name: str = "weight"
    ) -> SpectralFactors:
        """Return the stored factors of a weight (m, n), or compute and store them; on the weight's device.

        An entry serves only the very options that it was computed with, so a hit and a miss give the same
        bits.

        Raises:
            FactorError, ConfigError: as `truncated_svd`.
            StoreError: the entry cannot be written, and `must_write` is set.
        """
        fingerprint = weight_fingerprint(weight)
        path = self.path(fingerprint, k, tol, method)
        found = self._read(path, name)
        if found is not None:
            return found.to(weight.device)
        with self._locked(path):
            found = self._read(path, name, quiet=True)
            if found is not None:
                return found.to(weight.device)
            factors = truncated_svd(weight, k, tol, method, name=name)
            self._write(path, factors)
            return factors

    def path(self, fingerprint: str, k: int, tol: float, method: str) -> Path:
        """Return the file of an entry; it need not exist."""
        options = {"format": FORMAT, "weight": fingerprint, "k": int(k), "tol": float(tol), "method": method}
        key = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()
        return self.root / key[:2] / f"{key}.safetensors"

    def _read(self, path: Path, name: str, quiet: bool = False) -> SpectralFactors | None:
        """Return a verified entry; None where there is none or (with a warning) where it is damaged."""
        try:
            return _decode(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            problem = f"cannot be read ({error.strerror or error})"
        except ValueError as error:
            problem = f"is damaged ({error})"
        if not quiet:
            warnings.warn(
                f"layer {name}: stored factors {path} {problem}; computing them again", stacklevel=3
            )
        return None

    @contextlib.contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        """Hold the lock of an entry's folder; without it where the store cannot be written."""
        with contextlib.ExitStack() as stack:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(filelock.FileLock(path.parent / ".lock", timeout=_LOCK_SECONDS))
            except OSError as error:
                self._cannot_write(path, error)
            yield

    def _write(self, path: Path, factors: SpectralFactors) -> None:
        """Write an entry; the lock is held, so whatever lies aside of it was left by a process that died."""
        try:
            for leftover in path.parent.glob(f".{path.name}.*.part"):
                leftover.unlink(missing_ok=True)
            write_atomic(path, _encode(factors))
        except OSError as error:
            self._cannot_write(path, error)

    def _cannot_write(self, path: Path, error: OSError) -> None:
        message = f"factor store {self.root}: cannot write {path.name} ({error.strerror or error})"
        if self.must_write:
            raise StoreError(f"{message}; free some space there or point HIPLORA_CACHE elsewhere") from error
        warnings.warn(f"{message}; going on without storing it", stacklevel=4)


def _encode(factors: SpectralFactors) -> bytes:
    tensors = {key: getattr(factors, key).detach().cpu().contiguous() for key in _TENSORS}
    metadata = {
        "format": str(FORMAT),
        "checksum": _checksum(tensors),
        "residual": repr(factors.residual),
        "orthogonality": repr(factors.orthogonality),
        "method": factors.method,
        "basis": factors.basis,
        "fingerprint": factors.fingerprint,
    }
    metadata["seal"] = _seal(metadata)
    return save_tensors(tensors, metadata)


def _decode(raw: bytes) -> SpectralFactors:
    """Rebuild factors from a file's bytes.

    Raises:
        ValueError: anything about them is not as it was written.
    """
    try:
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        metadata = header["__metadata__"]
        tensors = load_tensors(raw)
        seal = metadata.pop("seal")
        U, sigma, V = (tensors[key] for key in _TENSORS)
    except Exception as error:  # every way in which a header can be broken; safetensors has its own exception
        raise ValueError(f"unreadable: {type(error).__name__}") from error
    if seal != _seal(metadata) or metadata["checksum"] != _checksum(tensors):
        raise ValueError("checksum mismatch")
    if not (
        U.shape[1] == sigma.shape[0] == V.shape[1] and all(torch.isfinite(t).all() for t in (U, sigma, V))
    ):
        raise ValueError("shapes or values that no decomposition has")
    return SpectralFactors(
        U,
        sigma,
        V,
        residual=float(metadata["residual"]),
        orthogonality=float(metadata["orthogonality"]),
        method=metadata["method"],
        basis=metadata["basis"],
        fingerprint=metadata["fingerprint"],
    )


def _checksum(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256("".join(weight_fingerprint(tensors[key]) for key in _TENSORS).encode()).hexdigest()


def _seal(metadata: dict[str, str]) -> str:
    """A hash over the metadata, so that a flipped byte in the certificate is noticed too."""
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()
