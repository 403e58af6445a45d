"""Files that are never half-written: each is written beside its place and renamed into it."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import platformdirs

from hiplora.errors import ConfigError


def cache_dir() -> Path:
    """Return the folder for models and factors: $HIPLORA_CACHE, else the user's cache folder for hiplora."""
    if root := os.environ.get("HIPLORA_CACHE"):
        return Path(root).expanduser()
    return Path(platformdirs.user_cache_dir("hiplora"))


def write_atomic(path: str | os.PathLike, data: str | bytes) -> Path:
    """Write `data` to `path` so that a reader sees the old file or the whole new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = data.encode() if isinstance(data, str) else data
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, file_mode())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)
        raise
    return path


def check_output_dir(path: str | os.PathLike, overwrite: bool = False) -> Path:
    """Return `path` if an output folder may be made there; a folder that exists needs `overwrite`.

    Raises:
        ConfigError: the path exists (and `overwrite` is False), or is not a folder.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--out {path}: exists and is not a folder; name another")
    if path.exists() and not overwrite:
        raise ConfigError(f"--out {path}: exists already; name another folder or pass --overwrite")
    return path


@contextlib.contextmanager
def staged_dir(path: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `path`; on success it becomes `path`, on failure it is removed.

    Raises:
        ConfigError: as `check_output_dir`.
    """
    final = check_output_dir(path, overwrite)
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}.", suffix=".part"))
    os.chmod(aside, 0o777 & ~_umask())
    try:
        yield aside
        if final.exists():
            old = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}.", suffix=".old"))
            os.replace(final, old / "old")
            os.replace(aside, final)
            shutil.rmtree(old)
        else:
            os.replace(aside, final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def file_mode() -> int:
    """Return the permissions that this process gives a new file."""
    return 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
