"""A data set for a comparison: checked, split by content into training and held-out rows, written as files."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hiplora.errors import DataError
from hiplora.files import write_atomic
from hiplora.provenance import file_sha256
from hiplora.recipes.rows import read_rows
from hiplora.recipes.shapes import check_rows

HELDOUT_LIMIT = 256  # held-out rows at most: enough for a mean, cheap to measure


@dataclass(frozen=True)
class SplitData:
    """Rows of one shape, split; `source` is the file's name and `sha256` the hash of its bytes."""

    shape: str
    train: list[Any]
    heldout: list[Any]
    source: str
    sha256: str

    def write(self, folder: Path) -> None:
        """Write `train.jsonl` and `heldout.jsonl`."""
        for name, rows in (("train", self.train), ("heldout", self.heldout)):
            lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
            write_atomic(folder / f"{name}.jsonl", "".join(lines))


def split_data(path: Path, fraction: float) -> SplitData:
    """Read a data file in one of the usual shapes and hold back a `fraction` of its rows, at most 256.

    Which rows depends on their content alone: not on their order, nor on a seed, and equal rows stay together.

    Raises:
        DataError: the file or a row cannot be used, or a part would be empty.
    """
    shape, rows = check_rows(read_rows(path), "auto", path)
    train, heldout = hold_back(rows, fraction)
    if not train or not heldout:
        raise DataError(
            f"{path}: {len(rows)} rows cannot be split into training and held-out rows (--heldout-fraction "
            f"{fraction}); give at least two rows that differ, or another fraction"
        )
    return SplitData(shape, train, heldout, path.name, file_sha256(path))


def hold_back(rows: Sequence[Any], fraction: float) -> tuple[list[Any], list[Any]]:
    """Split rows into (kept, held back), each in its old order, by the hash of each row."""
    digests = [_digest(row) for row in rows]
    count = min(HELDOUT_LIMIT, max(1, round(fraction * len(rows))))
    limit = sorted(digests)[count - 1]
    kept = [row for row, digest in zip(rows, digests, strict=True) if digest > limit]
    return kept, [row for row, digest in zip(rows, digests, strict=True) if digest <= limit]


def _digest(row: Any) -> str:
    canonical = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()
