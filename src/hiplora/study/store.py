"""The folder of a study's results: one JSON file a job, named by its key, and a lock while the job runs.

results/KEY.json     a finished job's record
artifacts/KEY/       what later jobs read (an adapter), complete if it has the file .complete
failures/KEY.json    why a job failed, until it succeeds
locks/KEY.lock       held while a job runs; the system drops it when the process dies
"""

import contextlib
import fcntl
import gzip
import json
import os
import traceback
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import Timeout

from hiplora.errors import ConfigError, HipLoraError
from hiplora.files import file_lock, write_atomic
from hiplora.provenance import provenance
from hiplora.study.jobs import DIVERGED, KINDS, Graph, Job, key_of


@dataclass(frozen=True)
class Place:
    """Where a study's jobs find results, model and data, and whether they may run code that the model writes."""

    folder: Path
    model: str
    data: Path | None = None
    allow_code: bool = False

    def located(self, name: str) -> str:
        """Return the path of a study's file: `name` in the data folder, else as it is (a path or hub name)."""
        return str(self.data / name) if self.data is not None and (self.data / name).is_file() else name


class Store:
    """The folder of a study's results, which need not exist yet. Any number of processes may use it at once."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._records: dict[str, dict[str, Any]] = {}  # those that were read, by key

    def record(self, job: Job) -> dict[str, Any] | None:
        """Return a finished job's record; None if it is not finished."""
        if job.key not in self._records:
            path = self._file("results", job.key)
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
                if not isinstance(record, dict) or not isinstance(record.get("result"), dict):
                    raise ValueError("not a record of a job")
                self._records[job.key] = record
            except FileNotFoundError:
                return None
            except (ValueError, RecursionError) as error:
                raise HipLoraError(f"{path}: damaged ({error}); remove the file to run the job again") from None
        return self._records[job.key]

    def result(self, job: Job) -> dict[str, Any] | None:
        """Return a finished job's result; None if it is not finished."""
        record = self.record(job)
        return None if record is None else record["result"]

    def diverged(self, job: Job) -> str | None:
        """Return why a finished job has no numbers: its training, or one it needs, diverged; else None."""
        return (self.result(job) or {}).get(DIVERGED)

    def finished(self, job: Job) -> bool:
        """Whether a job's result is stored."""
        return job.key in self._records or self._file("results", job.key).is_file()

    def readable(self, job: Job) -> bool:
        """Whether later jobs can read all that a job leaves: its result, and its artifact if it makes one."""
        has_artifact = not KINDS[job.kind].makes or (self.artifact(job) / ".complete").is_file()
        return self.finished(job) and (has_artifact or self.diverged(job) is not None)

    def artifact(self, job: Job) -> Path:
        """Return the folder with what a job makes for later ones."""
        return self.path / "artifacts" / job.key

    def finish(self, job: Job, result: Mapping[str, Any], timing: Mapping[str, Any], artifact: bool) -> None:
        """Write a job's record, unless there is one."""
        if artifact:
            write_atomic(self.artifact(job) / ".complete", "")
        if not self.finished(job):
            record = {
                **{name: getattr(job, name) for name in ("key", "kind", "version", "name", "settings")},
                "needs": {name: need.key for name, need in job.needs.items()},
                "result": result,
                "timing": timing,
                "provenance": provenance(),
            }
            write_atomic(self._file("results", job.key), json.dumps(record))
        self._file("failures", job.key).unlink(missing_ok=True)

    def fail(self, job: Job, error: BaseException) -> None:
        """Store why a job failed."""
        failure = {
            "name": job.name,
            "error": str(error) or type(error).__name__,
            "traceback": "".join(traceback.format_exception(error)),
        }
        write_atomic(self._file("failures", job.key), json.dumps(failure, indent=1))

    def failure(self, job: Job) -> dict[str, Any] | None:
        """Return a failed job's `error` and `traceback`; None if it did not fail, or the reason cannot be read."""
        try:
            return json.loads(self._file("failures", job.key).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None

    @contextlib.contextmanager
    def claimed(self, job: Job) -> Iterator[bool]:
        """Hold a job's lock inside the block; yields False, at once, if another process holds it."""
        path = self._lock(job)
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(file_lock(path, timeout=0))
                claimed = True
            except Timeout:
                claimed = False
            yield claimed

    def at_work(self, job: Job) -> bool:
        """Whether a process holds a job's lock now."""
        if not self._lock(job).exists():
            return False
        with self.claimed(job) as claimed:
            return not claimed

    @contextlib.contextmanager
    def slot(self, exclusive: bool) -> Iterator[None]:
        """Hold a shared lock on the machine inside the block; with `exclusive`, run while no other job does."""
        with open(self.path / ".turn.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
            yield

    def take(self, path: Path) -> int:
        """Add the records of a file that `export` wrote, or ConfigError; return how many were new."""
        try:
            raw = path.read_bytes()
            lines = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode().splitlines()
            records = {self._file("results", _checked_key(json.loads(line))): line for line in lines if line}
        except (OSError, EOFError, ValueError, KeyError, TypeError, RecursionError, zlib.error) as error:
            raise ConfigError(
                f"--reuse {path}: cannot be read ({error}); expected the records.jsonl.gz of a study's report"
            ) from None
        new = {file: line for file, line in records.items() if not file.exists()}
        for file, line in new.items():
            write_atomic(file, line)
        return len(new)

    def export(self, jobs: Iterable[Job], path: str | os.PathLike) -> None:
        """Write the records of the finished jobs to one gzipped file, from which `take` continues elsewhere."""
        records = sorted(filter(None, map(self.record, jobs)), key=lambda record: record["key"])
        text = "".join(json.dumps(record) + "\n" for record in records)
        write_atomic(path, gzip.compress(text.encode(), mtime=0))

    def unfinished(self, graph: Graph) -> dict[Job, bool]:
        """Return the jobs that are left to do, in the graph's order, and whether each can start.

        A finished job, of a reused record, is done again only if an unfinished one needs its artifact. Jobs on which no
        wanted result depends are not done.
        """
        pending = [job for job in graph.wanted if not self.finished(job)]
        unfinished: set[Job] = set()
        while pending:
            job = pending.pop()
            if job not in unfinished:
                unfinished.add(job)
                is_present = self.readable if KINDS[job.kind].reads else self.finished
                pending += [need for need in job.needs.values() if not is_present(need)]
        return {job: unfinished.isdisjoint(job.needs.values()) for job in graph if job in unfinished}

    def _file(self, folder: str, key: str) -> Path:
        return self.path / folder / f"{key}.json"

    def _lock(self, job: Job) -> Path:
        return self.path / "locks" / f"{job.key}.lock"


def _checked_key(record: Mapping[str, Any]) -> str:
    key = key_of(*(record[name] for name in ("kind", "version", "settings", "needs")))
    if record["key"] != key or not {"result", "timing", "provenance"} <= record.keys():
        raise ValueError(f"record {record['key']!r} does not match its key")
    return key
