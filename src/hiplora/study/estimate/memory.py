"""The peak memory of a job: what lies there all the time, and what one pass adds to it."""

from collections.abc import Mapping
from typing import Any

from hiplora.models.shapes import FACTORED, ModelShape, osf_rank
from hiplora.study.estimate import flops
from hiplora.study.estimate.factoring import full_settings
from hiplora.study.estimate.load import Load

ADAPTER_BYTES = 16  # fp32: the parameter, its gradient, AdamW's two moments
# fp32 copies of the logits that are there at once: in training those learned from, their log-softmax and gradients.
TRAINED_COPIES, SCORED_COPIES = 5, 2
# Most numbers of logits that training holds on a CPU, positions that scoring does, columns of a GPU's fused head.
LOGITS_LIMIT = 2**29
SCORED_POSITIONS = 4096
TILE = 32768


def memory_bytes(
    load: Load,
    shape: ModelShape,
    dtype_bytes: int,
    trainable: int = 0,
    runtime: int = 0,
    tiled_head: bool = False,
) -> int:
    """Return the peak memory of a job: weights + adapter and its optimizer + factors + activations + logits + cache.

    Within a fifth of the measured peak for LoRA and HiP-LoRA on the attention projections of SmolLM2-135M, with
    batches of 64 to 2,048 tokens, with checkpointing and without; up to a quarter below it with LoRA on all layers.

    Args:
        load: what the job does; a pass has `batch_tokens` tokens.
        shape: of the model.
        dtype_bytes: of an element of weights and activations.
        trainable: parameters of the adapter, all in fp32.
        runtime: what is taken before there is a model.
        tiled_head: whether training never holds whole rows of logits, as it does not on a GPU.
    """
    resident = shape.parameters * dtype_bytes + 4 * load.factor_scalars + runtime
    adapter = trainable * (ADAPTER_BYTES if load.train else 4)
    texts = load.decode_batch * load.sequence_length if load.generated_tokens else 0
    passing = _activation_bytes(load, shape, dtype_bytes) + _logit_bytes(load, shape, tiled_head)
    return int(resident + adapter + max(passing, flops.cache_bytes(shape, texts, dtype_bytes)))


def activation_elements(shape: ModelShape) -> int:
    """Return how many numbers a token leaves in one layer for the backward pass, weights frozen, without an adapter.

    Norms keep their inputs (2 hidden); attention q, k, v (k and v as wide as q, since they are repeated) and its
    output; the MLP gate, its activation and up (3 intermediate).
    """
    return 2 * shape.hidden + 4 * shape.heads * shape.head_size + 3 * shape.intermediate


def adapter_elements(shape: ModelShape, method_settings: Mapping[str, Any]) -> int:
    """Return how many fp32 numbers a token leaves in the adapters of all layers: `Load.adapter_elements`.

    PEFT's LoRA keeps, of every layer that it adapts, the input after dropout and the dropout's mask; without dropout
    the input, as OSF always does. HiP-LoRA keeps the input and a byte an element of mask. All keep the thin
    activation.

    Raises:
        ConfigError: the settings are not a recipe's method, or do not fit the model.
    """
    settings = full_settings(method_settings)
    if settings["name"] == "osf":
        targets = shape.targets(settings)
        return sum(n + 2 * osf_rank(settings, name, min(m, n)) for name, (m, n) in targets.items())
    mask = (0.25 if settings["name"] in FACTORED else 1.0) if settings["lora_dropout"] else 0.0
    inputs = sum(n for _, n in shape.targets(settings).values())
    return int(inputs * (1 + mask)) + (settings.get("init_r") or settings["r"]) * len(shape.targets(settings))


def _activation_bytes(load: Load, shape: ModelShape, dtype_bytes: int) -> float:
    layer = activation_elements(shape) * dtype_bytes
    if not load.train:
        return load.batch_tokens * layer
    adapters = load.adapter_elements
    if adapters is None:  # LoRA with dropout on four projections of every layer
        adapters = 8 * shape.hidden * shape.layers
    if load.checkpointing:
        kept = shape.layers * shape.hidden * dtype_bytes + layer + 4 * adapters / shape.layers
    else:
        kept = shape.layers * layer + 4 * adapters
    return load.batch_tokens * kept


def _logit_bytes(load: Load, shape: ModelShape, tiled_head: bool) -> float:
    """Logits of one pass, for the share of its tokens that have some."""
    tokens = load.train_tokens if load.train else load.forward_tokens
    positions = load.batch_tokens * min(load.logit_positions / tokens, 1.0) if tokens else 0.0
    if not load.train:
        return 4.0 * SCORED_COPIES * min(positions, SCORED_POSITIONS) * shape.vocabulary
    tile = 4.0 * TRAINED_COPIES * positions * min(TILE, shape.vocabulary)
    if tiled_head:
        return tile
    whole = positions * shape.vocabulary
    return tile if whole > LOGITS_LIMIT else 4.0 * TRAINED_COPIES * whole
