"""A short measurement of this machine: how fast it trains, scores, generates and decomposes."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hiplora.files import cache_dir, write_atomic
from hiplora.models import quiet_transformers
from hiplora.models.shapes import ModelShape, model_config, shape_of
from hiplora.provenance import json_sha256, provenance
from hiplora.spectral import truncated_svd
from hiplora.study.estimate import factoring, flops
from hiplora.study.estimate.machine import Machine

FORMAT = 2  # raised when the measurement changes
MOST_PARAMETERS = 300_000_000  # of the model that is timed; larger ones are timed on fewer layers
MOST_VOCABULARY = 65_536
TRAIN_ROWS, ROW_TOKENS = 2, 256
DECODE_BATCH, DECODE_STEPS = 8, 8
RANK = 32
BUDGET_SECONDS = 12.0
RUNTIME_BYTES = 700 << 20  # resident memory of a process with torch, PEFT and TRL, before there is a model
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def measure_machine(model: str, *, refresh: bool = False, rounds: int = 3) -> Machine:
    """Measure this machine on a model's architecture, or return what was measured before.

    Training steps, scoring and generating are timed with random weights: their values change no time, so neither a
    download nor the memory of a large model is needed. A model of over 300 million parameters is timed on as many of
    its layers as that allows (one at least), and a vocabulary beyond 65,536 is cut. The quickest of `rounds` counts,
    as the least disturbed by others. Under 20 seconds on two cores for SmolLM2-135M.

    What is measured is kept in the cache folder, by architecture, processor, threads and library versions.

    Args:
        model: as for `model_shape`.
        refresh: measure again.
        rounds: how often each thing is timed, if time allows; twice at least, and the first does not count.

    Raises:
        ConfigError: as `model_config`.
    """
    config = _stand_in(model_config(model))
    path = cache_dir() / "machines" / f"{_key(config)}.json"
    if not refresh and (known := _read(path)) is not None:
        return known
    machine = _measured(config, rounds)
    write_atomic(path, json.dumps(asdict(machine), indent=2) + "\n")
    return machine


def _stand_in(config: Any) -> Any:
    """The same architecture with as few layers and tokens as make it quick to time."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.vocab_size = min(text.vocab_size, MOST_VOCABULARY)
    shape = shape_of(small)
    layer = (shape.parameters - shape.embedding_parameters) / shape.layers
    most = max(int((MOST_PARAMETERS - shape.embedding_parameters) / layer), 1)
    if shape.layers > most:
        text.num_hidden_layers = most
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:most]
    small.bos_token_id = small.eos_token_id = small.pad_token_id = (
        None  # they may lie beyond a cut vocabulary
    )
    return small


def _measured(config: Any, rounds: int) -> Machine:
    cuda = torch.cuda.is_available()
    dtype, device = (torch.bfloat16, "cuda") if cuda else (torch.float32, "cpu")
    shape = shape_of(config)
    rates = _rates(_Subject(config, shape, dtype, device).jobs(), rounds)
    found = provenance()
    return Machine(
        name=torch.cuda.get_device_name()
        if cuda
        else f"{found['machine']['processor']}, {_threads()} threads",
        train_flops_per_s=rates["training"],
        forward_flops_per_s=rates["scoring"],
        decode_bytes_per_s=rates["generating"],
        svd_flops_per_s=rates["decomposing"],
        memory_bytes=torch.cuda.get_device_properties(0).total_memory if cuda else memory_here(),
        dtype_bytes=dtype.itemsize,
        devices=torch.cuda.device_count() if cuda else 1,
        runtime_bytes=600 << 20 if cuda else RUNTIME_BYTES,
        tiled_head=cuda,
        basis=(
            f"measured {found['time']} on {shape.layers} layers of {config.model_type} {shape.hidden} wide: "
            f"{rates['training'] / 1e9:,.0f} GFLOP/s in training, {rates['scoring'] / 1e9:,.0f} in scoring, "
            f"{rates['decomposing'] / 1e9:,.0f} in decompositions, {rates['generating'] / 1e9:,.1f} GB/s in generating"
        ),
    )


def memory_here() -> int:
    """Return this machine's memory in bytes, or the limit of the container that this process is in."""
    total = psutil.virtual_memory().total
    try:
        return min(total, int(CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # no container, or "max"
        return total


def _rates(jobs: Mapping[str, tuple[Callable[[], Any], float]], rounds: int) -> dict[str, float]:
    """Return the amount a second of each job, by its quickest run after the first.

    The jobs take turns, so that a disturbance of some seconds spoils no job altogether. No round begins after
    `BUDGET_SECONDS` but the second one.
    """
    times: dict[str, list[float]] = {name: [] for name in jobs}
    begin = time.perf_counter()
    for finished in range(rounds + 1):
        if finished > 1 and time.perf_counter() - begin > BUDGET_SECONDS:
            break
        for name, (work, _) in jobs.items():
            times[name].append(_seconds(work))
    return {name: amount / min(times[name][1:]) for name, (_, amount) in jobs.items()}


def _seconds(work: Callable[[], Any]) -> float:
    synchronise = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronise()
    start = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - start


class _Subject:
    """A random model with LoRA on all linear layers, and what is timed on it."""

    def __init__(self, config: Any, shape: ModelShape, dtype: torch.dtype, device: str):
        with quiet_transformers(), torch.random.fork_rng():
            torch.manual_seed(0)
            network: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device)
            self.model: Any = get_peft_model(network, LoraConfig(r=16, target_modules="all-linear"))
            self.weight = torch.randn(*[min(shape.hidden, 2048)] * 2).to(device)
        self.shape, self.element = shape, dtype.itemsize
        ids = torch.arange(TRAIN_ROWS * ROW_TOKENS, device=device) % shape.vocabulary
        self.ids = ids.reshape(TRAIN_ROWS, ROW_TOKENS)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained)

    def jobs(self) -> dict[str, tuple[Callable[[], Any], float]]:
        """Return what is timed, each with its amount: operations, or bytes that are read."""
        shape, tokens = self.shape, self.ids.numel()
        count = sum(p.numel() for p in self.trained)
        decoded = DECODE_STEPS * shape.parameters * self.element
        decomposed = factoring.truncated_flops(len(self.weight), len(self.weight), self._rank)
        return {
            "training": (self._train, flops.training(shape, tokens, tokens, ROW_TOKENS, count)),
            "scoring": (self._score, flops.forward(shape, tokens, TRAIN_ROWS, ROW_TOKENS)),
            "generating": (self._generate, decoded),
            "decomposing": (lambda: truncated_svd(self.weight, self._rank), decomposed),
        }

    @property
    def _rank(self) -> int:
        return min(RANK, len(self.weight))

    def _train(self) -> None:
        self.model.train()
        self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def _score(self) -> None:
        self.model.eval()
        with self.model.disable_adapter():
            self.model(input_ids=self.ids, use_cache=False, logits_to_keep=1)

    @torch.no_grad()
    def _generate(self) -> None:
        self.model.eval()
        cache, step = None, self.ids.new_zeros(DECODE_BATCH, 1)
        with self.model.disable_adapter():
            for _ in range(DECODE_STEPS):
                output = self.model(input_ids=step, past_key_values=cache, use_cache=True)
                cache, step = output.past_key_values, output.logits[:, -1:].argmax(-1)


def _key(config: Any) -> str:
    found = provenance()
    fields_ = {name: found[name] for name in ("libraries", "machine")}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return json_sha256(
        {"format": FORMAT, **fields_, "gpu": gpu, "threads": _threads(), "config": config.to_dict()}
    )[:32]


def _threads() -> int:
    return min(torch.get_num_threads(), os.cpu_count() or 1)


def _read(path: Path) -> Machine | None:
    """A measurement from the cache; one that cannot be read is made again."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Machine(**{field.name: values[field.name] for field in fields(Machine)})
    except (OSError, ValueError, KeyError, TypeError):
        return None
