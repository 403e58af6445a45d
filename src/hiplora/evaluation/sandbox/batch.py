"""Many programs, several at a time."""

import os
import selectors
import time
from collections.abc import Callable, Collection, Iterator, Sequence

from hiplora.errors import ConfigError, HipLoraError
from hiplora.evaluation.sandbox.launch import Sandbox
from hiplora.evaluation.sandbox.limits import Limits, Outcome


def run_batch(
    sources: Sequence[str],
    limits: Limits,
    layers: Collection[str],
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> list[Outcome]:
    """Run each program isolated by exactly these layers; as `run.run_programs` otherwise."""
    if os.name != "posix":
        raise HipLoraError("the code sandbox needs Linux (or macOS, with fewer guards); on Windows use WSL 2")
    if workers < 1:
        raise ConfigError(f"workers is {workers}; the sandbox needs at least 1")
    outcomes: dict[int, Outcome] = {}
    waiting = iter(enumerate(sources))
    running: dict[Sandbox, int] = {}
    try:
        while True:
            for index, source in _take(waiting, workers - len(running)):
                running[Sandbox(source, limits, layers)] = index
            if not running:
                return [outcomes[index] for index in range(len(sources))]
            for sandbox, outcome in _wait(list(running)):
                outcomes[running.pop(sandbox)] = outcome
                if progress is not None:
                    progress(len(outcomes))
    finally:
        for sandbox in running:
            sandbox.close()


def _take(waiting: Iterator[tuple[int, str]], count: int) -> Iterator[tuple[int, str]]:
    for _, item in zip(range(count), waiting, strict=False):
        yield item


def _wait(running: list[Sandbox]) -> list[tuple[Sandbox, Outcome]]:
    """Wait until at least one program is done or overdue; return those with their outcomes, closed."""
    with selectors.DefaultSelector() as selector:
        for sandbox in running:
            selector.register(sandbox, selectors.EVENT_READ, sandbox)
        first = min(sandbox.deadline for sandbox in running)
        ready = [key.data for key, _ in selector.select(max(0.0, first - time.monotonic()))]
    done = []
    for sandbox in running:
        if sandbox in ready:
            done.append((sandbox, sandbox.outcome()))
        elif time.monotonic() > sandbox.deadline:
            done.append((sandbox, Outcome("killed", 0.0, "", "its sandbox gave no answer")))
        else:
            continue
        sandbox.close()
    return done
