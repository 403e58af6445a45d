"""Where a study keeps what its jobs found: one file a result, written whole, and a lock for each job at work.

results/KEY.json     a finished job's record
artifacts/KEY/       what later jobs read (an adapter); complete where the record says so
work/KEY/            an unfinished job's own files, from which it goes on
failures/KEY.json    why a job failed, until it succeeds
locks/KEY.lock       held while a job is at work; the system drops it when the process dies
"""

import contextlib
import fcntl
import gzip
import json
import os
import shutil
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hiplora.errors import ConfigError, HipLoraError
from hiplora.files import write_atomic
from hiplora.provenance import provenance
from hiplora.study.engine.jobs import DIVERGED, Job, key_of


class Store:
    """The folder of a study's results. Any number of processes may use it at once."""

    def __init__(self, path: str | os.PathLike):
        """Open the folder, or one that is not there yet; nothing is written."""
        self.path = Path(path)
        self._kept: dict[str, dict[str, Any]] = {}

    def record(self, job: Job) -> dict[str, Any] | None:
        """Return a finished job's record, None where it is not finished."""
        if job.key not in self._kept:
            try:
                self._kept[job.key] = json.loads(self._result(job).read_text(encoding="utf-8"))
            except FileNotFoundError:
                return None
            except ValueError as error:
                raise HipLoraError(
                    f"{self._result(job)}: is no JSON ({error}); remove the file, and the job is done again"
                ) from None
        return self._kept[job.key]

    def result(self, job: Job) -> dict[str, Any] | None:
        """Return what a finished job found, None where it is not finished."""
        record = self.record(job)
        return None if record is None else record["result"]

    def diverged(self, job: Job) -> str | None:
        """Return why a finished job has no more to say: a training, its own or one before it, diverged; else None."""
        return (self.result(job) or {}).get(DIVERGED)

    def finished(self, job: Job) -> bool:
        """Whether a job's result is there."""
        return job.key in self._kept or self._result(job).is_file()

    def artifact(self, job: Job) -> Path:
        """Return the folder with what a job made for others."""
        return self.path / "artifacts" / job.key

    def has_artifact(self, job: Job) -> bool:
        """Whether a job's artifact is there, whole."""
        return (self.artifact(job) / ".complete").is_file()

    def work(self, job: Job) -> Path:
        """Return the folder that a job may use while it is at work, kept if it is interrupted."""
        return self.path / "work" / job.key

    def finish(self, job: Job, found: Mapping[str, Any], timing: Mapping[str, Any], artifact: bool) -> None:
        """Write a job's record; its working folder goes. A record that is there already stays: first come."""
        if artifact:
            self.artifact(job).mkdir(parents=True, exist_ok=True)
            write_atomic(self.artifact(job) / ".complete", "")
        if not self.finished(job):
            record = {
                **job.to_json(),
                "result": dict(found),
                "timing": dict(timing),
                "provenance": provenance(),
            }
            write_atomic(self._result(job), json.dumps(record))
        shutil.rmtree(self.work(job), ignore_errors=True)
        self._failure(job).unlink(missing_ok=True)

    def fail(self, job: Job, error: BaseException, run: str) -> None:
        """Write down why a job failed in the run named `run`."""
        told = {
            "name": job.name,
            "kind": job.kind,
            "error": str(error) or type(error).__name__,
            "type": type(error).__name__,
            "traceback": "".join(traceback.format_exception(error)),
            "runs": sorted({run, *(self.failure(job) or {}).get("runs", ())}),
        }
        write_atomic(self._failure(job), json.dumps(told, indent=1))

    def failure(self, job: Job, run: str | None = None) -> dict[str, Any] | None:
        """Return why a job failed, in the run named `run` or whenever; None if it did not."""
        try:
            told = json.loads(self._failure(job).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return told if run is None or run in told.get("runs", ()) else None

    @contextlib.contextmanager
    def claimed(self, job: Job) -> Iterator[bool]:
        """Hold a job's lock for a while; yields False, at once, where another process holds it."""
        folder = self.path / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{job.key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def at_work(self, job: Job) -> bool:
        """Whether some process holds a job's lock now."""
        if not (self.path / "locks" / f"{job.key}.lock").exists():
            return False
        with self.claimed(job) as mine:
            return not mine

    @contextlib.contextmanager
    def turn(self, alone: bool) -> Iterator[None]:
        """Hold a place among the jobs at work; with `alone`, the only one."""
        self.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path / ".turn.lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            yield
        finally:
            os.close(handle)

    def take(self, records: str | os.PathLike) -> int:
        """Put the records of another study's file (`export`) beside the own ones; return how many were new.

        Raises:
            ConfigError: there is no such file, or it holds no records.
        """
        path, new = Path(records), 0
        try:
            raw = path.read_bytes()
            text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
            lines = [json.loads(line) for line in text.splitlines() if line]
            named = [(_checked_key(line), json.dumps(line)) for line in lines]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"--reuse {path}: cannot be read ({error}); expected records.jsonl or records.jsonl.gz, as a study's "
                "report writes it"
            ) from None
        for key, line in named:
            place = self.path / "results" / f"{key}.json"
            if not place.exists():
                write_atomic(place, line)
                new += 1
        return new

    def _result(self, job: Job) -> Path:
        return self.path / "results" / f"{job.key}.json"

    def _failure(self, job: Job) -> Path:
        return self.path / "failures" / f"{job.key}.json"


def _checked_key(record: Mapping[str, Any]) -> str:
    """The key of a record; a ValueError where it is not that of what the record was made from."""
    parts = {name: record[name] for name in ("kind", "version", "settings", "needs")}
    if record["key"] != key_of(**parts) or not {"result", "timing", "provenance"} <= record.keys():
        raise ValueError(f"record {record['key']!r} is not what its key says")
    return str(record["key"])


def export(store: Store, jobs: Iterable[Job], path: str | os.PathLike) -> int:
    """Write the records of the finished jobs to one file, gzipped if it ends so, the same bytes for the same records.

    Returns their number. `Store.take` reads it: a study goes on from it on another machine.
    """
    records = sorted((r for job in jobs if (r := store.record(job)) is not None), key=lambda r: r["key"])
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    write_atomic(path, gzip.compress(text, mtime=0) if str(path).endswith(".gz") else text)
    return len(records)
