"""What a training adds to its task's loss, once an optimizer step."""

from typing import Any, Protocol

from torch import Tensor


class Penalty(Protocol):
    """A price on the adapter: `weight` times what calling it returns is added, once a step; recorded under `name`."""

    @property
    def name(self) -> str:
        """Its column in the metrics."""
        ...

    @property
    def weight(self) -> float:
        """What one unit of it costs."""
        ...

    def __call__(self, model: Any, step: int) -> Tensor:
        """Return the price, without its weight: a scalar with a gradient to the adapter's parameters."""
        ...
