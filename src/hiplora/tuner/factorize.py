"""Factor a whole model ahead of time, one weight at a time: the model itself is never loaded."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from hiplora.errors import ConfigError, DataError, FactorError, first_line
from hiplora.models import resolve
from hiplora.spectral import FactorStore, resolve_rank, squared_singular_values
from hiplora.tuner.config import HipLoraConfig
from hiplora.tuner.targets import Target, find_targets


@dataclass(frozen=True)
class Factored:
    """The factors of one target; `size` is its entry in the store in bytes, `reused` that it was stored before."""

    name: str
    kind: str
    shape: tuple[int, int]
    k: int
    method: str
    residual: float
    orthogonality: float
    seconds: float
    size: int
    reused: bool


class Checkpoint:
    """The weights of a saved causal language model, read one at a time from its safetensors files."""

    def __init__(self, model: str):
        """Find the files of a model folder, hub name, or one of hiplora's own names; read no weight yet.

        Raises:
            ConfigError: there is no such model, it is quantised, or it has no safetensors files.
            DataError: a file of it is damaged.
        """
        self.model = model
        path = resolve(model)
        try:
            config = AutoConfig.from_pretrained(path)
            with torch.device("meta"):
                self.skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(config)
            self._files = _tensor_files(path)
        except DataError:
            raise
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"model {model}: cannot be read ({first_line(error)}); expected the folder or hub name of a "
                "causal language model with safetensors weights (`save_pretrained` writes them)"
            ) from error
        if getattr(config, "quantization_config", None) is not None:
            raise ConfigError(
                f"model {model}: its weights are quantised and cannot be read one by one; load it and call "
                "peft.get_peft_model, which dequantises them and fills the same store"
            )

    def targets(self, config: HipLoraConfig) -> list[Target]:
        """Return the weights that an adapter of this configuration would factor, in the model's order.

        Raises:
            ConfigError: no module matches, one that does is not a linear layer, or its weight is not in the files.
            FactorError: a principal rank exceeds a weight's smaller side.
            DataError: a file is damaged, or a weight does not have the shape that config.json implies.
        """
        targets = find_targets(self.skeleton, config)
        for target in targets:
            if isinstance(target.k, int) and target.k > min(target.shape):
                raise FactorError(
                    f"layer {target.name}: principal_rank {target.k} exceeds min(out, in) = {min(target.shape)}; "
                    "lower it or set principal_rank_pattern"
                )
            with self._opened(target) as (tensors, key):
                shape = tuple(tensors.get_slice(key).get_shape())
            expected = target.shape[::-1] if target.transposed else target.shape
            if shape != expected:
                raise DataError(
                    f"{self._files[key]}: {key} has shape {shape}, expected {expected} from config.json; "
                    "the folder mixes two models"
                )
        return targets

    def read(self, target: Target) -> Tensor:
        """Return a target's weight as (out, in), in the checkpoint's dtype."""
        with self._opened(target) as (tensors, key):
            weight = tensors.get_tensor(key)
        return weight.T if target.transposed else weight

    @contextlib.contextmanager
    def _opened(self, target: Target) -> Iterator[tuple[Any, str]]:
        """Open the file of a target's weight; yield it and the tensor's name."""
        full = f"{target.name}.weight"
        # A checkpoint of the bare backbone leaves out the model's prefix.
        names = (full, full.removeprefix(f"{self.skeleton.base_model_prefix}."))
        key = next((name for name in names if name in self._files), None)
        if key is None:
            raise ConfigError(
                f"layer {target.name}: model {self.model} keeps no tensor {full}; its checkpoint is laid out "
                "differently: load the model and call peft.get_peft_model, which fills the same store"
            )
        with _readable(self._files[key]), safe_open(self._files[key], framework="pt") as tensors:
            yield tensors, key


def factorize(
    checkpoint: Checkpoint,
    targets: list[Target],
    store: FactorStore,
    *,
    tol: float = 1e-4,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> Iterator[Factored]:
    """Fill a store with the factors of some weights, yielding after each; memory holds one weight at a time.

    Stored factors are verified and kept, so an interrupted run goes on when it is started again. `dtype` is that in
    which the model will be trained, where it is not the checkpoint's: rounded weights are other weights.

    Raises:
        FactorError, StoreError, ConfigError, DataError: as `FactorStore` and `Checkpoint`.
    """
    for target in targets:
        start, made = time.perf_counter(), store.made
        weight = checkpoint.read(target).to(device=device, dtype=dtype)
        k = resolve_rank(target.k, target.shape, functools.partial(squared_singular_values, weight))
        factors = store.get_or_compute(weight, k, tol, name=target.name)
        yield Factored(
            name=target.name,
            kind=target.kind,
            shape=target.shape,
            k=k,
            method=factors.method,
            residual=factors.residual,
            orthogonality=factors.orthogonality,
            seconds=time.perf_counter() - start,
            size=store.factor_path(factors.fingerprint, k, tol).stat().st_size,
            reused=store.made == made,
        )


def _tensor_files(path: str) -> dict[str, str]:
    """Return tensor name → file of a folder or hub name, whole or in shards."""
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    if index is None:
        single = cached_file(path, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
        if single is None:
            raise FileNotFoundError(f"no {SAFE_WEIGHTS_NAME} in it")
        with _readable(single), safe_open(single, framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), single)
    with _readable(index):
        get_checkpoint_shard_files(path, index)  # downloads the shards of a hub model
        names = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    files = {name: Path(index).parent / file for name, file in names.items()}
    for file in sorted(set(files.values())):
        if not file.is_file():
            raise DataError(f"{file}: is missing, and {index} names it; fetch the model again")
    return {name: str(file) for name, file in files.items()}


@contextlib.contextmanager
def _readable(file: str) -> Iterator[None]:
    """Turn what a damaged file raises into an error that names it."""
    try:
        yield
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        if isinstance(error, (ConfigError, DataError)):
            raise
        raise DataError(
            f"{file}: cannot be read ({first_line(error)}); fetch or save the model again"
        ) from error
