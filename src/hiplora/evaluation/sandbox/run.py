"""Run programs that nobody has read, each in a sandbox of its own, with every guard that the machine gives."""

from collections.abc import Callable, Sequence

from hiplora.evaluation.sandbox.batch import run_batch
from hiplora.evaluation.sandbox.isolation import active_layers
from hiplora.evaluation.sandbox.limits import Limits, Outcome


def run_program(source: str, limits: Limits | None = None) -> Outcome:
    """Run one program; as `run_programs` otherwise."""
    return run_programs([source], limits)[0]


def run_programs(
    sources: Sequence[str],
    limits: Limits | None = None,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> list[Outcome]:
    """Run Python programs, `workers` at a time, and return what became of each, in their order.

    Programs find the standard library and nothing else, `__name__` is not "__main__", standard input is empty.
    Call `require_permission` first. `progress` is told how many programs are done.

    Raises:
        ConfigError: `workers` is not positive.
        HipLoraError: the sandbox could not be made with the guards that the machine showed before; this is Windows.
    """
    return run_batch(sources, limits or Limits(), active_layers(), workers, progress)
