"""What the benchmarks share: their options, turns of the contenders, and the record that they write."""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hiplora.files import write_atomic
from hiplora.provenance import provenance


def options(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that knows `--json` and shows a module's docstring."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the record to this file")
    return parser


def turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Yield round and name, in an order that rotates: drift of the machine hits all alike."""
    for turn in range(rounds):
        shift = turn % len(names)
        for name in (*names[shift:], *names[:shift]):
            yield turn, name


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Return what the work returns, its seconds, and its CPU seconds: those of all threads together."""
    start = time.perf_counter(), time.process_time()
    result = work()
    return result, {"seconds": time.perf_counter() - start[0], "cpu_seconds": time.process_time() - start[1]}


def write(path: Path | None, record: dict[str, Any], **about: Any) -> None:
    """Write a record, with its provenance, where a path is given."""
    if path:
        text = json.dumps(record | {"provenance": provenance(**about)}, indent=2, ensure_ascii=False)
        write_atomic(path, text + "\n")
        print(f"wrote {path}")
