"""Checkpoints that are whole or absent: written aside, flushed, renamed into place."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hiplora.errors import first_line

FULL = 2**20  # bytes free below which a failed write needs no other explanation
NAME = re.compile(r"step-(\d+)")


def step_of(checkpoint: Path) -> int:
    """Return the number of optimizer steps that a checkpoint stands for."""
    found = NAME.fullmatch(checkpoint.name)
    if not found:
        raise ValueError(f"{checkpoint} is not a checkpoint: expected a folder named step-<number>")
    return int(found.group(1))


def all_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints of a folder, oldest first; what was never finished is not among them."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if NAME.fullmatch(path.name)), key=step_of)


@contextlib.contextmanager
def staged(final: Path) -> Iterator[Path]:
    """Yield an empty folder beside `final`; on success it becomes `final`, on failure it is removed.

    Raises:
        OSError: it cannot be written (a full disk, most often), whatever the writer's own error was.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}.", suffix=".part"))
    try:
        with writing(final):
            yield aside
            flush(aside)
            remove(final)
            os.replace(aside, final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def writing(what: Path) -> Iterator[None]:
    """Turn whatever a writer raises on a full disk into an OSError that names the place and the way out."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(_existing(what)).free
        reason = "the disk is full" if free < FULL else f"{first_line(error)}; {free / 2**20:.0f} MiB free"
        raise OSError(
            f"{what} cannot be written ({reason}); make room and run the same command again: it carries on from "
            "the last checkpoint"
        ) from error


def flush(folder: Path) -> None:
    """Have the system put every file of a folder on the disk before the folder gets its name."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove(folder: Path) -> None:
    """Remove a folder such that it is never there in part: it loses its name first."""
    if not folder.exists():
        return
    grave = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".old"))
    os.replace(folder, grave / "old")
    shutil.rmtree(grave, ignore_errors=True)


def prune(folder: Path, keep: int) -> None:
    """Remove all checkpoints but the newest `keep`."""
    for checkpoint in all_checkpoints(folder)[:-keep]:
        remove(checkpoint)


def sweep(folder: Path) -> None:
    """Remove what interrupted runs left aside: unfinished and half-removed folders."""
    for path in folder.glob(".*"):
        if path.suffix in (".part", ".old"):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())
