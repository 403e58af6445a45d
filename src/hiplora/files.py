"""Files that are never half-written: each is written beside its place and renamed into it."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock, Timeout

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


Inputs = Mapping[str, "str | os.PathLike | None"]  # what it is → a file or folder, or a name on the hub


def check_output_dir(path: str | os.PathLike, overwrite: bool = False, inputs: Inputs | None = None) -> Path:
    """Return `path` if an output folder may be made there; a folder that exists needs `overwrite`.

    Raises:
        ConfigError: the path exists (and `overwrite` is False), is not a folder, is or holds one of the `inputs` or
            lies in it, or is one that nobody means to replace: the working directory, the home folder, one that holds
            either, or a git checkout.
    """
    path = Path(path)
    if not path.exists():
        return path
    if not path.is_dir():
        raise ConfigError(f"--out {path}: exists and is not a folder; name another")
    _spare_inputs(path, inputs, "--out")
    if not overwrite:
        raise ConfigError(f"--out {path}: exists already; name another folder or pass --overwrite")
    folder, own = path.resolve(), [Path.cwd(), Path.home()]
    if any(folder == mine or folder in mine.parents for mine in own) or (folder / ".git").exists():
        raise ConfigError(f"--out {path}: --overwrite would delete all of this folder; name another")
    return path


def check_output_file(
    path: str | os.PathLike, overwrite: bool = False, option: str = "--out", inputs: Inputs | None = None
) -> Path:
    """Return `path` if a file may be written there; one that exists needs `overwrite`. `option` is what named it.

    Raises:
        ConfigError: the path is a folder, is one of the `inputs` or lies in it, or exists and `overwrite` is False.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{option} {path}: is a folder; name a file in it")
    if path.exists():
        _spare_inputs(path, inputs, option)
        if not overwrite:
            raise ConfigError(f"{option} {path}: exists already; name another file or pass --overwrite")
    return path


def _spare_inputs(path: Path, inputs: Inputs | None, option: str) -> None:
    """Raise ConfigError if replacing a path that exists would delete an input or a part of it."""
    final = path.resolve()
    for what, given in (inputs or {}).items():
        if given and os.path.exists(given):
            place = Path(given).resolve()
            if place == final or final in place.parents or place in final.parents:
                raise ConfigError(f"{option} {path}: replacing it would delete {what} ({given}); name another")


@contextlib.contextmanager
def staged_dir(path: str | os.PathLike, overwrite: bool = False, inputs: Inputs | None = None) -> Iterator[Path]:
    """Yield an empty folder beside `path`; on success it becomes `path`, on failure it is removed.

    A folder that is replaced goes only when the new one is in its place. What a killed process left is put right first.

    Raises:
        ConfigError: as `check_output_dir`, before the block runs and again before its folder is put in place; or
            another process is working there.
    """
    final = check_output_dir(path, overwrite, inputs)
    final.parent.mkdir(parents=True, exist_ok=True)
    lock = locked(final.parent / f".{final.name}.part.lock", path)
    try:
        _sweep(final)
        final = check_output_dir(path, overwrite, inputs)
        aside = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}.", suffix=".part"))
        os.chmod(aside, 0o777 & ~_UMASK)
        yield aside
        for file in aside.rglob("*"):  # safetensors gives its files to their owner alone
            if file.is_file():
                file.chmod(file_mode())
        if check_output_dir(final, overwrite).exists():
            _replace_dir(aside, final)
        else:
            os.replace(aside, final)
    finally:
        _sweep(final)
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def locked(file: Path, out: str | os.PathLike) -> FileLock:
    """Return the lock `file` of an output folder, taken; ConfigError if another process holds it."""
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"--out {out}: another process is working there; wait for it or name another folder"
        ) from None
    return lock


def _replace_dir(new: Path, final: Path) -> None:
    """Put `new` in the place of `final`; if that fails, put `final` back."""
    old = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}.", suffix=".old"))
    os.replace(final, old / "old")
    os.replace(new, final)  # if it fails, or the process is killed here, the sweep puts `final` back


def _sweep(final: Path) -> None:
    """Remove what a staged folder left beside its place, but put a folder back that was to be replaced and was not."""
    left = re.compile(rf"\.{re.escape(final.name)}\.[^.]+\.(part|old)")  # not what belongs to a longer name: model.v2
    found = [path for path in final.parent.iterdir() if left.fullmatch(path.name)]
    for old in (path for path in found if path.suffix == ".old"):
        if (old / "old").exists() and not final.exists():
            os.replace(old / "old", final)
        shutil.rmtree(old, ignore_errors=True)
    for aside in (path for path in found if path.suffix == ".part"):
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)


def parse_yaml(text: str) -> Any:
    """Read YAML of plain values, lists and mappings; `1e-3` is a number, as in YAML 1.2.

    Raises:
        ValueError: it is not YAML, or has an alias, by which a few lines can stand for gigabytes.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError(f"line {self.peek_event().start_mark.line + 1}: has an alias (*name); write it out")
            return super().compose_node(parent, index)

    exponent = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", exponent, list("-+0123456789."))
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # what PyYAML's constructors raise
        raise ValueError(str(error)) from None


def file_mode() -> int:
    """Return the permissions that this process gives a new file."""
    return 0o666 & ~_UMASK


_UMASK = os.umask(0)  # read once: reading means setting, which would race with threads that make files
os.umask(_UMASK)
