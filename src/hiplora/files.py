"""Files that are never half-written: each is written beside its place and renamed into it."""

import contextlib
import contextvars
import glob
import json
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
from hiplora.provenance import json_sha256


def cache_dir() -> Path:
    """Return the folder for models and factors: $HIPLORA_CACHE, else the user's cache folder for hiplora."""
    return Path(os.environ.get("HIPLORA_CACHE") or platformdirs.user_cache_dir("hiplora")).expanduser()


def write_atomic(path: str | os.PathLike, data: str | bytes) -> Path:
    """Write `data` to `path` so that a reader sees the old file or the whole new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = data.encode() if isinstance(data, str) else data
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, file_mode())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    return path


def write_state(path: str | os.PathLike, value: Mapping[str, Any]) -> dict[str, Any]:
    """Write a JSON object, and return it as `read_state` will."""
    state: dict[str, Any] = json.loads(json.dumps(value))
    write_atomic(path, json.dumps({"sha256": json_sha256(state), "value": state}, indent=1))
    return state


def read_state(path: str | os.PathLike) -> dict[str, Any] | None:
    """Return what `write_state` wrote; None if there is no such file, or it is damaged."""
    try:
        state = json.loads(Path(path).read_text(encoding="utf-8"))
        return state["value"] if state["sha256"] == json_sha256(state["value"]) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


Inputs = Mapping[str, "str | os.PathLike | None"]  # what it is → a file or folder, or a name on the hub
_SPARED: contextvars.ContextVar[Inputs | None] = contextvars.ContextVar("spared", default=None)


@contextlib.contextmanager
def sparing(inputs: Inputs) -> Iterator[None]:
    """Let no output replace these inputs inside the block, besides those that its writer names."""
    token = _SPARED.set({**(_SPARED.get() or {}), **inputs})
    try:
        yield
    finally:
        _SPARED.reset(token)


def check_output_dir(
    path: str | os.PathLike, overwrite: bool = False, inputs: Inputs | None = None, option: str = "--out"
) -> Path:
    """Return `path`, which `option` named, if an output folder may be made there; one that exists needs `overwrite`.

    Raises:
        ConfigError: the path exists (and `overwrite` is False), is not a folder, is or holds one of the `inputs` or
            lies in it, or is one that nobody means to replace: the working directory, the home folder, one that holds
            either, or a git checkout.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{option} {path}: exists and is not a folder; name another")
    _check_replaced(path, overwrite, inputs, option)
    if path.exists():
        folder = path.resolve()
        holds_user = any(place.resolve().is_relative_to(folder) for place in (Path.cwd(), Path.home()))
        if holds_user or (folder / ".git").exists():
            raise ConfigError(f"{option} {path}: --overwrite would delete all of this folder; name another")
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
    _check_replaced(path, overwrite, inputs, option)
    return path


def _check_replaced(path: Path, overwrite: bool, inputs: Inputs | None, option: str) -> None:
    """Raise ConfigError if the path exists, unless it may be replaced and that deletes no input or a part of one."""
    if not path.exists():
        return
    final = path.resolve()
    for description, name in {**(_SPARED.get() or {}), **(inputs or {})}.items():
        if name and os.path.exists(name):
            source = Path(name).resolve()
            if source.is_relative_to(final) or final.is_relative_to(source):
                raise ConfigError(f"{option} {path}: replacing it would delete {description} ({name}); name another")
    if not overwrite:
        kind = "folder" if path.is_dir() else "file"
        raise ConfigError(f"{option} {path}: exists already; name another {kind} or pass --overwrite")


@contextlib.contextmanager
def staged_dir(path: str | os.PathLike, overwrite: bool = False, inputs: Inputs | None = None) -> Iterator[Path]:
    """Yield an empty folder beside `path`; on success it becomes `path`, on failure it is removed.

    A folder that is replaced goes only when the new one is in its place. What a killed process left is put right first.
    A `path` that is a link stays one; the folder is where it leads.

    Raises:
        ConfigError: as `check_output_dir`, before the block runs and again before its folder is put in place; or
            another process is working there.
    """
    final = check_output_dir(path, overwrite, inputs).resolve()
    final.parent.mkdir(parents=True, exist_ok=True)
    lock = locked(final.parent / f".{final.name}.part.lock", path)
    try:
        sweep(final)
        check_output_dir(path, overwrite, inputs)
        staging = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}.", suffix=".part"))
        staging.chmod(0o777 & ~_UMASK)
        yield staging
        make_readable(staging)
        if check_output_dir(path, overwrite).exists():
            set_aside(final)
        os.replace(staging, final)  # if it fails, or the process is killed here, the sweep puts the old one back
    finally:
        sweep(final)
        Path(lock.lock_file).unlink(missing_ok=True)  # while it is held: the file of the next holder stays
        lock.release()


def make_readable(folder: Path) -> None:
    """Let others read a folder's files as usual: safetensors gives its own to their owner alone."""
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            with contextlib.suppress(PermissionError):  # another owner's
                file.chmod(file.stat().st_mode | (file_mode() & 0o444))


def file_lock(file: Path, timeout: float = -1) -> FileLock:
    """Return the lock `file`, not yet taken; OSError where it cannot be made, for which FileLock itself would wait."""
    file.touch()
    return FileLock(file, timeout)


def locked(file: Path, out: str | os.PathLike) -> FileLock:
    """Return the lock `file` of an output folder, taken; ConfigError if another process holds it."""
    lock = file_lock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"--out {out}: another process is working there; wait for it or name another folder"
        ) from None
    return lock


def set_aside(final: Path) -> None:
    """Move a folder that is to be replaced to a place beside it, from which `sweep` restores or removes it."""
    os.replace(final, Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}.", suffix=".old")) / "old")


def sweep(final: Path) -> None:
    """Remove leftovers beside a folder's place, but put back a folder that was to be replaced and was not."""
    # Not what belongs to a longer name, such as model.v2.
    temporary = re.compile(rf"\.{re.escape(final.name)}\.[^.]+\.(part|old)")
    leftovers = [path for path in final.parent.iterdir() if temporary.fullmatch(path.name) and path.is_dir()]
    for path in sorted(leftovers, key=lambda path: path.stat().st_mtime):  # of several, the first that was set aside
        if (path / "old").exists() and path.suffix == ".old" and not final.exists():
            os.replace(path / "old", final)
        shutil.rmtree(path, ignore_errors=True)


def is_set_aside(final: Path) -> bool:
    """Return whether a folder that was to be replaced waits beside its place."""
    return any(final.parent.glob(f".{glob.escape(final.name)}.*.old/old"))


def parse_yaml(text: str) -> Any:
    """Read YAML of plain values, lists and mappings; `1e-3` is a number, as in YAML 1.2.

    Raises:
        ValueError: it is not YAML, names a field twice, or has an alias, by which a few lines can stand for gigabytes.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if double := next((key for key in keys if keys.count(key) > 1), None):
                raise ValueError(f"line {node.start_mark.line + 1}: has {double!r} twice; keep one")
            return super().construct_mapping(node, deep)

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
