"""The record of a run: one row per logged step, kept in memory, in metrics.jsonl and in every checkpoint."""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hiplora.errors import DivergedError
from hiplora.files import write_atomic
from hiplora.training.checkpoints import writing

FILE = "metrics.jsonl"
STATE = "progress.json"

Row = dict[str, Any]
OnStep = Callable[[Row], None]


class Record:
    """What a run has measured so far, such that a resumed run goes on with the same numbers.

    A row has `step`, `loss` (mean over the steps since the last row), `lr`, `tokens` (read so far, padding not
    counted), `tokens_per_second` (since the last row) and `seconds` (of training, over all sessions; measuring
    and saving are not in it); with a penalty, its mean over those steps under its name, without its weight. Rows
    where it was measured also have `held_out_loss`; the row of step 0 has only
    that.
    """

    def __init__(self, folder: Path, steps: int, log_every: int, on_step: OnStep | None = None) -> None:
        """Write to `folder`/metrics.jsonl; `on_step` gets each row, with `steps` (the total) added."""
        self.rows: list[Row] = []
        self.tokens = 0
        self.seconds = 0.0
        self.peak_memory = 0
        self._steps = steps
        self._log_every = log_every
        self._path = folder / FILE
        self._on_step = on_step
        self._losses: list[float] = []
        self._penalties: dict[str, list[float]] = {}
        self._since = (0, 0.0)  # tokens and seconds at the last row
        self._loss = 0.0
        self._clock = time.perf_counter()

    def restart_clock(self) -> None:
        """Count seconds from now: call after whatever is not training."""
        self._clock = time.perf_counter()

    def add_batch(self, loss: float, tokens: int) -> None:
        """Add one forward-backward pass of the current step: its share of the step's loss, and its tokens."""
        self._loss += loss
        self.tokens += tokens

    def add_penalty(self, name: str, value: float) -> None:
        """Add what was measured of a penalty in the current step, or a share of it."""
        steps = self._penalties.setdefault(name, [])
        steps.extend([0.0] * (len(self._losses) + 1 - len(steps)))
        steps[-1] += value

    def end_step(self, step: int, lr: float) -> Row | None:
        """Close an optimizer step; return the new row if one is due.

        Raises:
            DivergedError: the loss is not a finite number.
        """
        now = time.perf_counter()
        self.seconds += now - self._clock
        self._clock = now
        loss, self._loss = self._loss, 0.0
        if not math.isfinite(loss):
            raise DivergedError(
                f"the loss is {loss} at step {step}; nothing later than the last checkpoint is kept. Lower "
                "train.lr, use train.dtype bf16 or fp32 instead of fp16, or look at the data of this step"
            )
        self._losses.append(loss)
        if step % self._log_every and step != self._steps:
            return None
        tokens, seconds = self._since
        row = {
            "step": step,
            "loss": sum(self._losses) / len(self._losses),
            **{name: sum(values) / len(self._losses) for name, values in self._penalties.items()},
            "lr": lr,
            "tokens": self.tokens,
            "tokens_per_second": (self.tokens - tokens) / max(self.seconds - seconds, 1e-9),
            "seconds": self.seconds,
        }
        self._losses, self._penalties, self._since = [], {}, (self.tokens, self.seconds)
        return row

    def write(self, row: Row) -> None:
        """Keep a row, append it to the file, show it."""
        self.rows.append(row)
        with writing(self._path), open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self._on_step is not None:
            self._on_step({**row, "steps": self._steps})

    def save(self, folder: Path) -> None:
        """Put everything into a checkpoint."""
        state = {
            "rows": self.rows,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "peak_memory": self.peak_memory,
            "losses": self._losses,
            "penalties": self._penalties,
            "since": self._since,
        }
        write_atomic(folder / STATE, json.dumps(state))

    def restore(self, folder: Path) -> None:
        """Take everything from a checkpoint; rows that were written after it are dropped from the file."""
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        self.rows, self.tokens, self.seconds = state["rows"], state["tokens"], state["seconds"]
        self.peak_memory, self._losses = state["peak_memory"], state["losses"]
        self._penalties = state.get("penalties", {})
        self._since = (state["since"][0], state["since"][1])
        self.rewrite()

    def rewrite(self) -> None:
        """Write the file anew from the rows in memory."""
        with writing(self._path):
            write_atomic(self._path, "".join(json.dumps(row) + "\n" for row in self.rows))


def read_metrics(folder: str | os.PathLike) -> list[Row]:
    """Read the rows of a run's metrics.jsonl."""
    lines = (Path(folder) / FILE).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]
