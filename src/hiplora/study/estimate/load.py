"""What a job does, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from hiplora.errors import ConfigError

_SUMMED = ("train_tokens", "forward_tokens", "generated_tokens", "svd_flops", "seconds", "disk_bytes")


@dataclass(frozen=True)
class Load:
    """What one job does on one device.

    Attributes:
        train_tokens: tokens that go forward and backward through frozen weights with an adapter.
        forward_tokens: tokens that are read without gradients: scoring.
        generated_tokens: tokens that are decoded one by one, `decode_batch` texts at a time.
        logit_positions: positions at which logits over the vocabulary are made, with gradients if `train`; those of
            generated tokens not counted.
        svd_flops: of decompositions (`svd_load`).
        seconds: what does not depend on the machine's speed: loading, starting a process.
        batch_tokens: tokens in one forward (and backward) pass; memory goes by it.
        train: whether a pass keeps activations for a backward pass.
        disk_bytes: what the job leaves on the disk.
        sequence_length: tokens of one text; each attends to half of them on average.
        decode_batch: texts that are generated at the same time.
        factor_scalars: numbers in the frozen factors that lie in memory beside the model
            (`ModelShape.factor_scalars`).
        adapter_elements: numbers that a token leaves in the adapters for the backward pass
            (`memory.adapter_elements`); None takes those of LoRA with dropout on four projections of every layer.
        checkpointing: whether training computes activations again in the backward pass instead of keeping them.

    Raises:
        ConfigError: a number is negative, or no text is generated at a time.
    """

    train_tokens: int = 0
    forward_tokens: int = 0
    generated_tokens: int = 0
    logit_positions: int = 0
    svd_flops: float = 0.0
    seconds: float = 0.0
    batch_tokens: int = 0
    train: bool = False
    disk_bytes: int = 0
    sequence_length: int = 512
    decode_batch: int = 8
    factor_scalars: int = 0
    adapter_elements: int | None = None
    checkpointing: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 1 if field.name == "decode_batch" else 0
            if value is not None and not value >= least:
                raise ConfigError(f"load: {field.name} is {value}; expected a number of at least {least}")

    @property
    def tokens(self) -> int:
        """Tokens that are read, trained on or written."""
        return self.train_tokens + self.forward_tokens + self.generated_tokens

    def __add__(self, other: Load) -> Load:
        """Return the load of one job that does both, one after the other.

        Positions with logits are those of the training where only one of the two trains; texts are as long as those of
        the one that has more tokens.
        """
        first, second = (self, other) if self._order() >= other._order() else (other, self)
        longer = self if self.tokens >= other.tokens else other
        writer = self if self.generated_tokens >= other.generated_tokens else other
        alike = self.train == other.train
        return replace(
            first,
            **{name: getattr(self, name) + getattr(other, name) for name in _SUMMED},
            logit_positions=first.logit_positions + (second.logit_positions if alike else 0),
            sequence_length=longer.sequence_length,
            decode_batch=writer.decode_batch,
            factor_scalars=max(self.factor_scalars, other.factor_scalars),
        )

    def times(self, count: int) -> Load:
        """Return the load of one job that does this so many times."""
        names = (*_SUMMED, "logit_positions")
        return replace(self, **{name: count * getattr(self, name) for name in names})

    def _order(self) -> tuple[bool, int]:
        return self.train, self.batch_tokens


@dataclass(frozen=True)
class Cost:
    """What jobs cost; the sum is that of jobs done one after another, so its memory is the largest of theirs."""

    flops: float = 0.0
    seconds: float = 0.0
    memory_bytes: int = 0
    disk_bytes: int = 0
    tokens: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.seconds + other.seconds,
            max(self.memory_bytes, other.memory_bytes),
            self.disk_bytes + other.disk_bytes,
            self.tokens + other.tokens,
        )
