"""What a training run measured; read back from a finished run's folder."""

import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

PROVENANCE_FILE = "provenance.json"
METRICS_FILE = "metrics.jsonl"

Row = dict[str, Any]


@dataclass(frozen=True)
class TrainResult:
    """A finished run: where the adapter is, and what was measured.

    `metrics` are the rows of metrics.jsonl. `seconds` is training alone, over all sessions. `peak_memory_bytes` is
    resident memory on a CPU, allocated memory on a GPU. `held_out` has the loss per learned token `before` and `after`.
    """

    adapter: Path
    metrics: list[Row]
    steps: int
    tokens: int
    seconds: float
    trainable_parameters: int
    peak_memory_bytes: int
    held_out: dict[str, float] | None
    data: dict[str, Any]
    warnings: list[str]

    @property
    def tokens_per_second(self) -> float:
        """Mean speed over the run."""
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def final_loss(self) -> float:
        """The loss of the last logged row."""
        return next(row["loss"] for row in reversed(self.metrics) if "loss" in row)

    def summary(self) -> dict[str, Any]:
        """Return the numbers as JSON values, without the folder and the rows."""
        kept = {name: value for name, value in vars(self).items() if name not in ("adapter", "metrics")}
        return {**kept, "tokens_per_second": self.tokens_per_second, "final_loss": self.final_loss}

    @classmethod
    def read(cls, folder: Path) -> "TrainResult":
        """Read the result of a finished run from its folder."""
        stored = json.loads((folder / PROVENANCE_FILE).read_text(encoding="utf-8"))["result"]
        stored |= {"adapter": folder, "metrics": read_metrics(folder)}
        return cls(**{item.name: stored[item.name] for item in fields(cls)})


def read_metrics(folder: str | os.PathLike) -> list[Row]:
    """Read the rows of a run's metrics.jsonl."""
    lines = (Path(folder) / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
