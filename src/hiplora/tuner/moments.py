"""Second moments of the inputs of a model's layers, and the store that keeps their eigenvectors."""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from hiplora.files import cache_dir, write_atomic
from hiplora.spectral import MomentBasis, SecondMoment, weight_fingerprint

FORMAT = 1
Bases = dict[str, MomentBasis]


class MomentCollector:
    """Sums up the second moments of the inputs of some layers while the model runs; padding does not count.

    Layers that are called in a row with the very same tensor (q, k and v; gate and up) share one moment.
    """

    def __init__(self, model: nn.Module, modules: Sequence[str]):
        self.moments: dict[str, SecondMoment] = {}
        self.leader: dict[str, str] = {}  # layer → the layer whose moment it shares
        self._model, self._modules = model, modules
        self._mask: Tensor | None = None
        self._last: tuple[str, Tensor] | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Listen inside the block, to the bare base model."""
        with bare(self._model), torch.no_grad():
            handles = [self._model.register_forward_pre_hook(self._begin, with_kwargs=True)]
            for name in self._modules:
                handles.append(self._model.get_submodule(name).register_forward_pre_hook(self._hook(name)))
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()
                self._last = self._mask = None

    def bases(self) -> Bases:
        """Return the eigenvectors of each layer's moment, shared where the moment is."""
        led = {name: self.moments.pop(name).eigen(name) for name in list(self.moments)}
        missing = [name for name in self._modules if name not in self.leader]
        if missing:
            SecondMoment(1).eigen(missing[0])  # says that no token reached it
        return {name: led[self.leader[name]] for name in self._modules}

    def _begin(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._mask = token_mask(args, kwargs)
        self._last = None

    def _hook(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple) -> None:
            x = args[0]
            if (
                self._last is not None
                and x is self._last[1]
                and self.leader.get(name, self._last[0]) == self._last[0]
            ):
                self.leader[name] = self._last[0]
                return
            if self.leader.setdefault(name, name) != name:
                return  # its leader has been summed up already, in this very pass
            self._last = (name, x)
            flat = x.reshape(-1, x.shape[-1])
            if self._mask is not None and self._mask.shape == x.shape[:-1]:
                flat = flat[self._mask.to(x.device).flatten()]
            if name not in self.moments:
                self.moments[name] = SecondMoment(x.shape[-1], x.device)
            self.moments[name].add(flat)

        return hook


@contextlib.contextmanager
def bare(model: nn.Module) -> Iterator[None]:
    """Have the base alone, inside the block: adapters off, evaluation mode; all is as it was afterwards."""
    adapted = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not m.disable_adapters]
    training = {module: module.training for module in model.modules()}
    gradients = {p: p.requires_grad for p in model.parameters()}
    try:
        model.eval()
        for layer in adapted:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in adapted:
            layer.enable_adapters(True)
        for module, mode in training.items():
            module.training = mode
        for parameter, flag in gradients.items():
            parameter.requires_grad_(flag)


def token_mask(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """Return which tokens of a model's call are text and not padding, (rows, length); None where it does not say."""
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


class CalibrationStore:
    """Sampled text and eigenvectors on disk, by what they were made from; whole or absent, verified on read."""

    def __init__(self, root: Path | None = None):
        self.root = root if root is not None else cache_dir() / "calibration"
        self.written = 0  # files that this object has made, rather than read

    def path(self, *key: Any) -> Path:
        """Return the file for something made from `key`."""
        digest = hashlib.sha256(json.dumps([FORMAT, *key], sort_keys=True).encode()).hexdigest()
        return self.root / digest[:2] / f"{digest}.safetensors"

    def read(self, path: Path) -> tuple[dict[str, Tensor], Any] | None:
        """Return the tensors and the record of a file; None where it is absent or (with a warning) damaged."""
        try:
            raw = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            warnings.warn(
                f"calibration {path}: cannot be read ({error.strerror}); measuring again", stacklevel=3
            )
            return None
        try:
            header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
            entry = json.loads(header["__metadata__"]["hiplora"])
            tensors = load_tensors(raw)
            if entry["checksum"] != _checksum(tensors, entry["record"]):
                raise ValueError("checksum mismatch")
        except Exception as error:  # every way in which bytes can be wrong
            warnings.warn(f"calibration {path}: is damaged ({error}); measuring again", stacklevel=3)
            return None
        return tensors, entry["record"]

    def write(self, path: Path, tensors: dict[str, Tensor], record: Any) -> None:
        """Write a file; where that fails a warning says so, and the work goes on without it."""
        entry = json.dumps({"record": record, "checksum": _checksum(tensors, record)}, sort_keys=True)
        self.written += 1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(path.parent / ".lock", timeout=600):
                for leftover in path.parent.glob(f".{path.name}.*.part"):
                    leftover.unlink(missing_ok=True)
                write_atomic(path, save_tensors(tensors, {"hiplora": entry}))
        except OSError as error:
            reason = error.strerror or error
            warnings.warn(
                f"calibration {path}: cannot be written ({reason}); going on without it", stacklevel=3
            )

    def read_bases(self, path: Path, modules: Sequence[str]) -> Bases | None:
        """Return the stored eigenvectors of these layers."""
        found = self.read(path)
        if found is None:
            return None
        tensors, record = found
        led = {
            name: MomentBasis(tensors[f"{name}.values"], tensors[f"{name}.vectors"], record["tokens"])
            for name in set(record["leader"].values())
        }
        return {name: led[record["leader"][name]] for name in modules}

    def write_bases(self, path: Path, bases: Bases, leader: dict[str, str]) -> None:
        """Write the eigenvectors of some layers, each shared one once."""
        tensors = {}
        for name in set(leader.values()):
            tensors[f"{name}.values"], tensors[f"{name}.vectors"] = bases[name].values, bases[name].vectors
        self.write(path, tensors, {"leader": leader, "tokens": next(iter(bases.values())).tokens})


def model_fingerprint(model: nn.Module) -> str:
    """Return a hash of the values of all of a model's own weights; adapters on it do not count."""
    digest, seen = hashlib.sha256(), set()
    for name, parameter in model.named_parameters():
        if any(part.startswith(("hiplora_", "lora_", "modules_to_save")) for part in name.split(".")):
            continue
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        digest.update(f"{name.replace('.base_layer', '')} {weight_fingerprint(parameter)}\n".encode())
    return digest.hexdigest()


def _checksum(tensors: dict[str, Tensor], record: Any) -> str:
    parts = [json.dumps(record, sort_keys=True)]
    parts += [f"{name} {weight_fingerprint(tensors[name])}" for name in sorted(tensors)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
