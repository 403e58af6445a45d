"""A content-addressed, crash-safe store of factors on disk."""

import contextlib
import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from hiplora.errors import StoreError
from hiplora.files import cache_dir, write_atomic
from hiplora.spectral.decompose import truncated_svd
from hiplora.spectral.factors import SpectralFactors, weight_fingerprint

logger = logging.getLogger(__name__)

FORMAT = (
    1  # raised whenever the decomposition or the file layout changes: old entries are then simply not found
)
_LOCK_SECONDS = 3600.0  # for one decomposition, of the largest weight, on a slow machine
_TENSORS = ("U", "sigma", "V")
_RECORD = ("residual", "orthogonality", "method", "basis", "fingerprint")


class FactorStore:
    """Factors kept on disk under the fingerprint of their weight and the options that made them.

    An entry is written aside and renamed, so it is whole or absent. One process computes it while others
    wait. Whatever is read is verified; a damaged entry is reported and computed again. A store that cannot
    be written costs a warning and the time to compute, unless `must_write` says that filling it is the
    purpose.
    """

    def __init__(self, root: str | os.PathLike | None = None, *, must_write: bool = False):
        self.root = Path(root) if root is not None else cache_dir() / "factors"
        self.must_write = must_write
        self.computed = 0  # decompositions that this object has made, rather than read

    def get_or_compute(
        self,
        weight: Tensor,
        k: int,
        tol: float = 1e-4,
        method: str = "auto",
        *,
        name: str = "weight",
        fingerprint: str | None = None,
    ) -> SpectralFactors:
        """Return the stored factors of a weight (m, n), or compute and store them; on the weight's device.

        An entry serves only the very options that it was computed with, so a hit and a miss give the same
        bits. `name` appears in messages; `fingerprint` saves hashing a weight whose fingerprint is known.

        Raises:
            FactorError, ConfigError: as `truncated_svd`.
            StoreError: the entry cannot be written, and `must_write` is set.
        """
        if weight.is_meta or weight.dim() != 2:  # nothing to hash: let the decomposition say what is wrong
            return truncated_svd(weight, k, tol, method, name=name)
        fingerprint = fingerprint or weight_fingerprint(weight)
        path = self.path(fingerprint, k, tol, method)
        expected = (fingerprint, (weight.shape[0], k), (weight.shape[1], k))
        factors = self._read(path, expected, name)
        if factors is None:
            with self._locked(path) as held:
                # Another process may have computed it while this one waited.
                factors = self._read(path, expected, name, quiet=True)
                if factors is None:
                    factors = truncated_svd(weight, k, tol, method, name=name, fingerprint=fingerprint)
                    self.computed += 1
                    if held:
                        self._write(path, factors)
        return factors.to(weight.device)

    def path(self, fingerprint: str, k: int, tol: float, method: str) -> Path:
        """Return the file that holds, or would hold, the factors of a weight under these options."""
        options = {"format": FORMAT, "weight": fingerprint, "k": int(k), "tol": float(tol), "method": method}
        key = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()
        return self.root / key[:2] / f"{key}.safetensors"

    def _read(self, path: Path, expected: tuple, name: str, quiet: bool = False) -> SpectralFactors | None:
        """Return a verified entry; None where there is none or (with a warning) where it is damaged."""
        try:
            factors = _decode(path.read_bytes())
            if (factors.fingerprint, factors.U.shape, factors.V.shape) == expected:
                return factors
            problem = "belong to another weight"
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            problem = f"cannot be read ({error.strerror or error})"
        except ValueError as error:
            problem = f"are damaged ({error})"
        if not quiet:
            message = f"layer {name}: the stored factors {path} {problem}; computing them again"
            warnings.warn(message, stacklevel=3)
        return None

    @contextlib.contextmanager
    def _locked(self, path: Path) -> Iterator[bool]:
        """Hold the lock of an entry's folder; yield False where it cannot be had (a read-only store)."""
        with contextlib.ExitStack() as stack:
            held = True
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(filelock.FileLock(path.parent / ".lock", timeout=_LOCK_SECONDS))
            except (OSError, NotImplementedError) as error:
                held = False
                self._cannot_write(path, error)
            yield held

    def _write(self, path: Path, factors: SpectralFactors) -> None:
        """Write an entry. The lock is held, so files aside of it were left by a process that was killed."""
        try:
            for leftover in path.parent.glob(f".{path.name}.*.part"):
                leftover.unlink(missing_ok=True)
            write_atomic(path, _encode(factors))
        except OSError as error:
            self._cannot_write(path, error)

    def _cannot_write(self, path: Path, error: Exception) -> None:
        reason = getattr(error, "strerror", None) or error
        message = f"factor store {self.root}: cannot write {path.name} ({reason})"
        if self.must_write:
            raise StoreError(f"{message}; free some space or set HIPLORA_CACHE to another folder") from error
        warnings.warn(f"{message}; going on without storing it", stacklevel=4)


def _encode(factors: SpectralFactors) -> bytes:
    tensors = {key: getattr(factors, key).detach().cpu().contiguous() for key in _TENSORS}
    record = {key: getattr(factors, key) for key in _RECORD}
    record["checksum"] = _checksum(record, tensors)
    # One metadata key: safetensors writes several in random order, and equal factors should be equal files.
    return save_tensors(tensors, {"hiplora": json.dumps(record, sort_keys=True)})


def _decode(raw: bytes) -> SpectralFactors:
    """Rebuild factors from a file's bytes.

    Raises:
        ValueError: anything about them is not as it was written.
    """
    try:
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        record = json.loads(header["__metadata__"]["hiplora"])
        loaded = load_tensors(raw)
        tensors = {key: loaded[key] for key in _TENSORS}
        checksum = record.pop("checksum")
    except Exception as error:  # every way in which a header can be broken; safetensors has its own exception
        raise ValueError(f"unreadable: {type(error).__name__}") from error
    if checksum != _checksum(record, tensors):
        raise ValueError("checksum mismatch")
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise ValueError("NaN or Inf among the values")
    return SpectralFactors(tensors["U"], tensors["sigma"], tensors["V"], **record)


def _checksum(record: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """A hash over the certificate and the tensors: a flipped byte in either is noticed."""
    parts = [json.dumps(record, sort_keys=True), *(weight_fingerprint(tensors[key]) for key in _TENSORS)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
