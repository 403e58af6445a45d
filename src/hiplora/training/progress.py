"""A progress bar for training: loss, tokens a second and the time left, on stderr, where someone watches."""

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any


class TrainingBar:
    """Show a run: pass it as `on_step`, its `phase` as `on_phase` and its `note` as `on_note`.

    Where stderr is not a terminal, only notes are written.

    Used as a context manager, so that the terminal is left in order whatever happens.
    """

    def __init__(self, what: str = "training") -> None:
        """Name the run; nothing is drawn before the context is entered."""
        self._what = what
        self._progress: Any = None
        self._task: Any = None

    def __enter__(self) -> "TrainingBar":
        """Start drawing."""
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(compact=True),
                console=Console(stderr=True),
                transient=False,
            )
            self._task = self._progress.add_task(self._what, total=None, numbers="")
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing; the last state stays on the screen."""
        if self._progress is not None:
            self._progress.stop()

    def phase(self, text: str) -> None:
        """Say what is being done now; a line of its own, so that it can be read later."""
        if self._progress is not None:
            self._progress.console.print(f"{self._what}: {text}", style="dim", highlight=False, markup=False)

    def note(self, text: str) -> None:
        """Say what a person should know, terminal or not."""
        if self._progress is not None:
            self._progress.console.print(f"{self._what}: {text}", highlight=False, markup=False)
        else:
            print(f"{self._what}: {text}", file=sys.stderr)

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Take a row of the metrics, with the total number of steps under `steps`."""
        if self._progress is None or "loss" not in row:
            return
        self._progress.update(
            self._task,
            total=row["steps"],
            completed=row["step"],
            numbers=f"loss {row['loss']:.3f} · {row['tokens_per_second']:,.0f} tokens/s",
        )
