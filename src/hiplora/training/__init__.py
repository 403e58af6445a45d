"""Supervised fine-tuning: data in the usual shapes, packing, and runs that can be stopped and carried on."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hiplora.training.result import TrainResult
    from hiplora.training.sft import train

__all__ = ["TrainResult", "train"]


def __getattr__(name: str) -> Any:
    """Load the training itself, and torch with it, on first use; the data formats do not need them."""
    if name == "train":
        from hiplora.training.sft import train

        return train
    if name == "TrainResult":
        from hiplora.training.result import TrainResult

        return TrainResult
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
