"""Tensors on disk under the hash of what they were made from: whole or absent, and verified on every read."""

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from hiplora.errors import StoreError
from hiplora.files import cache_dir, file_lock, write_atomic
from hiplora.spectral.factors import SpectralFactors, weight_fingerprint
from hiplora.spectral.svd import truncated_svd

_LOCK_SECONDS = 3600.0  # the longest wait for another process that computes the same entry
_RECORD = ("residual", "orthogonality", "method", "basis", "fingerprint")
Entry = tuple[dict[str, Tensor], Any]  # named tensors and a record of JSON values


class TensorStore:
    """Content-addressed entries of named tensors with a JSON record.

    One process computes an entry while others wait; a damaged one is reported and computed again. `made` counts the
    entries that this object computed instead of reading them.
    """

    def __init__(self, root: str | os.PathLike):
        self.root = Path(root)
        self.made = 0

    def path(self, *key: Any) -> Path:
        """Return the file of the entry that is made from `key`, a list of JSON values."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.root / digest[:2] / f"{digest}.safetensors"

    def get_or_make(self, path: Path, make: Callable[[], Entry]) -> Entry:
        """Return the entry in a file of this store, else store what `make` returns (StoreError: it cannot be)."""
        if (entry := self._read(path)) is not None:
            return entry
        with self._writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = file_lock(path.parent / ".lock", _LOCK_SECONDS).acquire()
        with lock:
            # Another process may have computed it while this one waited.
            entry = self._read(path, quiet=True)
            if entry is None:
                entry = make()
                self.made += 1
                with self._writing(path):
                    _write(path, *entry)
        return entry

    def _read(self, path: Path, quiet: bool = False) -> Entry | None:
        """Return a verified entry; None where it is absent or (with a warning) damaged."""
        try:
            raw = path.read_bytes()
            header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
            stored = json.loads(header["__metadata__"]["hiplora"])
            tensors = load_tensors(raw)
            if stored["checksum"] != _checksum(tensors, stored["record"]):
                raise ValueError("checksum mismatch")
            return tensors, stored["record"]
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:  # every way in which bytes can be wrong
            if not quiet:
                warnings.warn(f"{path}: cannot be read ({error}); computing it again", stacklevel=3)
            return None

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Raise StoreError, with the way out, if the store cannot be written or locked inside the block."""
        try:
            yield
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or error
            raise StoreError(
                f"cache {self.root}: cannot write {path.name} ({reason}); free some space or set HIPLORA_CACHE to "
                "another folder"
            ) from error


def _write(path: Path, tensors: dict[str, Tensor], record: Any) -> None:
    """Write an entry. The lock is held, so other temporary files of it were left by a killed process."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    # One metadata key: safetensors writes several in random order, and equal entries should be equal files.
    stored = json.dumps({"record": record, "checksum": _checksum(tensors, record)}, sort_keys=True)
    for leftover in path.parent.glob(f".{path.name}.*.part"):
        leftover.unlink(missing_ok=True)
    write_atomic(path, save_tensors(tensors, {"hiplora": stored}))


class FactorStore(TensorStore):
    """The singular triplets of weights, under the weight's fingerprint and the options of the decomposition."""

    FORMAT = 2  # raised when the decomposition or the layout changes: old entries are then not found

    def __init__(self, root: str | os.PathLike | None = None):
        super().__init__(cache_dir() / "factors" if root is None else root)

    def factor_path(self, fingerprint: str, k: int, tol: float = 1e-4) -> Path:
        """Return the file of a weight's factors."""
        return self.path("factors", self.FORMAT, fingerprint, k, float(tol))

    def get_or_compute(self, weight: Tensor, k: int, tol: float = 1e-4, *, name: str = "weight") -> SpectralFactors:
        """Return the stored factors of a weight (m, n), or compute and store them; on the weight's device.

        A hit and a miss give the same bits. Errors as `truncated_svd`, and StoreError: the entry cannot be written.
        """
        if weight.is_meta or weight.dim() != 2:  # nothing to hash: the decomposition says what is wrong
            return truncated_svd(weight, k, tol, name=name)
        fingerprint = weight_fingerprint(weight)

        def make() -> Entry:
            factors = truncated_svd(weight, k, tol, name=name, fingerprint=fingerprint)
            tensors = {"U": factors.U, "sigma": factors.sigma, "V": factors.V}
            return tensors, {key: getattr(factors, key) for key in _RECORD}

        tensors, record = self.get_or_make(self.factor_path(fingerprint, k, tol), make)
        factors = SpectralFactors(tensors["U"], tensors["sigma"], tensors["V"], **record)
        return factors.to(weight.device)


def _checksum(tensors: dict[str, Tensor], record: Any) -> str:
    """Hash the record and the tensors, so that a flipped byte in either is noticed."""
    parts = [json.dumps(record, sort_keys=True)]
    parts += [f"{name} {weight_fingerprint(tensors[name])}" for name in sorted(tensors)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
