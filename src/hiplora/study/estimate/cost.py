"""From a load and a machine to seconds and bytes."""

from hiplora.models.shapes import ModelShape
from hiplora.study.estimate import flops
from hiplora.study.estimate.load import Cost, Load
from hiplora.study.estimate.machine import Machine
from hiplora.study.estimate.memory import memory_bytes


def cost(load: Load, shape: ModelShape, machine: Machine, trainable: int = 0) -> Cost:
    """Return what a job costs on one device of a machine.

    Operations are those of `flops`. Training, scoring and decompositions take operations over the machine's rate; a
    step of generating takes the longest of three: reading weights and cache once, the operations of its texts, and
    the machine's least time a layer.

    Args:
        load: what the job does.
        shape: of the model.
        machine: where.
        trainable: parameters of the adapter (`ModelShape.trainable`).
    """
    trained, scored = (load.logit_positions, 0) if load.train else (0, load.logit_positions)
    length = load.sequence_length
    train = flops.training(shape, load.train_tokens, trained, length, trainable, load.checkpointing)
    forward = flops.forward(shape, load.forward_tokens, scored, length)
    decode_flops, decode_seconds = _decoding(load, shape, machine)
    seconds = (
        load.seconds
        + train / machine.train_flops_per_s
        + forward / machine.forward_flops_per_s
        + load.svd_flops / machine.svd_flops_per_s
        + decode_seconds
    )
    return Cost(
        flops=train + forward + load.svd_flops + decode_flops,
        seconds=seconds,
        memory_bytes=memory_bytes(
            load, shape, machine.dtype_bytes, trainable, machine.runtime_bytes, machine.tiled_head
        ),
        disk_bytes=load.disk_bytes,
        tokens=load.train_tokens + load.forward_tokens + load.generated_tokens,
    )


def _decoding(load: Load, shape: ModelShape, machine: Machine) -> tuple[float, float]:
    """Operations and seconds of generating."""
    if not load.generated_tokens:
        return 0.0, 0.0
    batch = min(load.decode_batch, load.generated_tokens)
    a_step = flops.forward(shape, batch, batch, load.sequence_length)
    read = float(shape.parameters * machine.dtype_bytes)
    read += flops.cache_bytes(shape, batch * load.sequence_length / 2, machine.dtype_bytes)
    seconds = max(
        read / machine.decode_bytes_per_s,
        a_step / machine.forward_flops_per_s,
        shape.layers * machine.layer_seconds,
    )
    steps = load.generated_tokens / batch
    return steps * a_step, steps * seconds
