"""A study's output folder: each finished stage is kept, so that an interrupted study carries on where it was.

plan.json       what is being studied: settings and the hashes of what goes in; written first
stages/         <stage>.json, each whole or absent
adapters/       the trained adapters
results.json    written last, with the report: where it is, the study is complete
"""

import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hiplora.errors import ConfigError
from hiplora.files import check_output_dir, write_atomic

PLAN, RESULTS, LOCK = "plan.json", "results.json", ".lock"


@dataclass(frozen=True)
class StudyFolder:
    """The places of a study inside its output folder, and the stages that are done."""

    path: Path

    @property
    def complete(self) -> bool:
        """Whether the study is finished."""
        return (self.path / RESULTS).is_file()

    def adapter(self, name: str) -> Path:
        """Folder of an adapter."""
        return self.path / "adapters" / name

    def read(self, stage: str) -> dict[str, Any] | None:
        """Return what a finished stage measured, or None."""
        file = self._stage(stage)
        return json.loads(file.read_text(encoding="utf-8"))["value"] if file.is_file() else None

    def has(self, *stages: str) -> bool:
        """Tell whether all these stages are finished."""
        return all(self._stage(stage).is_file() for stage in stages)

    def run(self, stage: str, work: Callable[[], dict[str, Any]], note: str = "") -> dict[str, Any]:
        """Return the stage's record, doing its work (and storing and timing it) only if it is not there yet."""
        kept = self.read(stage)
        if kept is not None:
            return kept
        began = time.perf_counter()
        _say(f"{note or stage} …")
        value = work()
        seconds = time.perf_counter() - began
        write_atomic(self._stage(stage), json.dumps({"seconds": seconds, "value": value}, indent=1))
        _say(f"{note or stage}: {seconds:.1f} s")
        return value

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each finished stage, in the order in which they finished."""
        files = sorted((self.path / "stages").glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
        return {file.stem: json.loads(file.read_text(encoding="utf-8"))["seconds"] for file in files}

    def _stage(self, stage: str) -> Path:
        return self.path / "stages" / f"{stage}.json"


def check_claim(out: Path, plan: Mapping[str, Any], overwrite: bool) -> None:
    """Check, without writing, that a study of `plan` may work in `out`: new, its own and unfinished, or overwritten.

    Raises:
        ConfigError: it may not; the message says what is there and the way out.
    """
    if overwrite or not out.exists():
        check_output_dir(out, overwrite)
        return
    stored = _stored_plan(out)
    if stored is None:
        if not out.is_dir() or {path.name for path in out.iterdir()} - {LOCK, "stages"}:
            check_output_dir(out)
        return  # empty, or of a study that was stopped before it wrote its plan
    if StudyFolder(out).complete:
        raise ConfigError(f"--out {out}: holds a finished study; name another folder or pass --overwrite")
    if changes := differences(stored, json.loads(json.dumps(plan))):
        raise ConfigError(
            f"--out {out}: holds an unfinished study of something else ({'; '.join(changes[:5])}); name another "
            "folder, ask for the same again to carry on, or pass --overwrite to start anew"
        )


@contextlib.contextmanager
def claimed(out: Path, plan: Mapping[str, Any], overwrite: bool) -> Iterator[StudyFolder]:
    """Hold a study's folder, made or emptied if need be, against other processes.

    Raises:
        ConfigError: as `check_claim`, or another process is working there.
    """
    check_claim(out, plan, overwrite)
    if overwrite and out.exists():
        if (out / LOCK).exists():
            _lock(out).release()  # nobody may be working in what is removed
        _remove(out)
    (out / "stages").mkdir(parents=True, exist_ok=True)
    lock = _lock(out)
    try:
        if any((out / "stages").glob("*.json")):
            _say(f"{out}: carrying on with an unfinished study")
        write_atomic(out / PLAN, json.dumps(plan, indent=2) + "\n")
        yield StudyFolder(out)
    finally:
        lock.release()


def differences(stored: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Name what differs between two plans, as `settings.steps: 100 there, 200 here`."""
    changes = []
    for key in dict.fromkeys([*stored, *asked]):
        there, here = stored.get(key), asked.get(key)
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            changes += differences(there, here, f"{prefix}{key}.")
        elif there != here:
            changes.append(f"{prefix}{key}: {there} there, {here} here")
    return changes


def _stored_plan(out: Path) -> dict[str, Any] | None:
    try:
        value = json.loads((out / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _lock(out: Path) -> FileLock:
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"--out {out}: another process is working there; wait for it or name another"
        ) from None
    return lock


def _remove(out: Path) -> None:
    """Remove a folder such that it is never there in part: it loses its name first."""
    grave = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".old"))
    os.replace(out, grave / "old")
    shutil.rmtree(grave)


def _say(text: str) -> None:
    """Tell a person at a terminal; nobody else."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)
