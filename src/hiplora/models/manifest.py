"""What a known model's folder must contain, so that a damaged one is never used."""

import json
import os
from pathlib import Path
from typing import Any

from hiplora.files import file_mode, write_atomic
from hiplora.models.known import KnownModel
from hiplora.provenance import file_sha256

MANIFEST = "hiplora-manifest.json"
FORMAT = 1  # raised when the conversion changes: folders of an older format are made anew


def write_manifest(folder: Path, model: KnownModel) -> None:
    """Record every file of a folder just made, and flush all of them to the disk."""
    files = {}
    for path in sorted(path for path in folder.iterdir() if path.name != MANIFEST):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        path.chmod(file_mode())  # safetensors makes its files private; a cache may serve several users
        files[path.name] = {"sha256": file_sha256(path), **_stamp(path)}
    record = {"format": FORMAT, "model": model.name, "source_sha256": model.source_sha256, "files": files}
    write_atomic(folder / MANIFEST, json.dumps(record, indent=2) + "\n")


def damage(folder: Path, model: KnownModel, full: bool = False) -> str | None:
    """Say what is wrong with a model folder, or return None if it is whole.

    A file whose size and time of change are as recorded is trusted; any other, and with `full` every one, is
    hashed. So a folder that was copied is read once in full, and one that was tampered with is found out.
    """
    try:
        record = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        expected: dict[str, dict[str, Any]] = record["files"]
        if record["format"] != FORMAT or record["source_sha256"] != model.source_sha256:
            return "it was made by another version of hiplora"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    for name, entry in expected.items():
        if said := _file_damage(folder / name, entry, full):
            return said
    return None


def _file_damage(path: Path, entry: dict[str, Any], full: bool) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    stamp = _stamp(path)
    if stamp["size"] != entry["size"]:
        return f"{path.name} has {stamp['size']} bytes, expected {entry['size']}"
    if (full or stamp["mtime_ns"] != entry["mtime_ns"]) and file_sha256(path) != entry["sha256"]:
        return f"{path.name} has changed"
    return None


def _stamp(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
