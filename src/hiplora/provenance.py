"""Where a number comes from: commit, machine, library versions, and hashes of what went in."""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

LIBRARIES = ("hiplora", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "numpy")


def provenance(**extra: Any) -> dict[str, Any]:
    """Describe this run: time, commit, versions, machine; `extra` (seeds, hashes, recipe) is added as given."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "python": platform.python_version(),
        "machine": {"system": platform.system(), "processor": _processor(), "cores": os.cpu_count()},
        **extra,
    }


def file_sha256(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def folder_identity(folder: str | os.PathLike) -> str | None:
    """Return a hash of a folder's files, which a copy of it shares; None if it is not a folder (a hub name).

    Of a large file the size and 64 pieces of a megabyte count.
    """
    path = Path(folder)
    if not path.is_dir():
        return None
    return json_sha256([[file.name, _sampled_sha256(file)] for file in sorted(path.iterdir()) if file.is_file()])


def _sampled_sha256(path: Path) -> str:
    size, piece, pieces = path.stat().st_size, 1 << 20, 64
    if size <= piece * pieces:
        return file_sha256(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for number in range(pieces):
            file.seek(number * (size - piece) // (pieces - 1))
            digest.update(file.read(piece))
    return digest.hexdigest()


def json_sha256(value: Mapping[str, Any] | list[Any]) -> str:
    """Return the SHA-256 of a JSON value in its canonical form (keys sorted, no spaces)."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _commit() -> str | None:
    """Commit of the checkout that hiplora runs from, with `-dirty` if it has changes; None if installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        described = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


@functools.cache
def _processor() -> str:
    with contextlib.suppress(OSError):
        if model := re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return model[1]
    return platform.processor() or platform.machine()
