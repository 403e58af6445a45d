"""The output folder of work that may be interrupted: who may work there, and what is done already.

The first file written holds the settings of the run, the last one completes it; finished stages are in `stages/`.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hiplora.errors import ConfigError
from hiplora.files import (
    Inputs,
    check_output_dir,
    file_lock,
    is_set_aside,
    locked,
    make_readable,
    parse_yaml,
    read_state,
    set_aside,
    sweep,
    write_atomic,
    write_state,
)

LOCK = ".lock"
WORK = ("stages", "checkpoints")  # what a run is carried on from


@dataclass(frozen=True)
class RunFolder:
    """An output folder: the file with the settings of the run (YAML or JSON), and the file that completes it."""

    path: Path
    settings: str
    last: str

    @property
    def complete(self) -> bool:
        """Whether the run is finished."""
        return (self.path / self.last).is_file()

    def stored(self) -> dict[str, Any] | None:
        """Return the settings of the run in the folder; None if there are none."""
        try:
            value = parse_yaml((self.path / self.settings).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def check(
        self,
        requested: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        inputs: Inputs | None = None,
    ) -> None:
        """Check, without writing, that a run with these settings may work here.

        It may in a folder that is new or may be overwritten, and in its own: an unfinished run is carried on, a
        finished one is accepted with `resume`. A folder that is or holds one of the `inputs` is never overwritten.
        Else ConfigError says what the folder holds and the way out.
        """
        if not self.path.exists() and is_set_aside(self.place):
            with self._swapping():  # a process was killed before it had anything in place of the run that it replaces
                sweep(self.place)
        if overwrite or not self.path.exists() or (self.complete and not resume):
            check_output_dir(self.path, overwrite, inputs)
            return
        stored = self.stored()
        if stored is None:
            if not self.path.is_dir() or {p.name for p in self.path.iterdir() if p.suffix != ".part"} - {LOCK}:
                check_output_dir(self.path)
            return
        if changes := differences(stored, json.loads(json.dumps(requested))):
            state = "a finished" if self.complete else "an unfinished"
            raise ConfigError(
                f"--out {self.path}: holds {state} run with other settings ({'; '.join(changes[:5])}); name another "
                "folder, repeat those settings to carry on, or pass --overwrite to start anew"
            )

    @contextlib.contextmanager
    def claimed(self, requested: Mapping[str, Any], *, overwrite: bool = False) -> Iterator[None]:
        """Hold the folder against other processes (or ConfigError); make it or empty it, and write the settings.

        A run that fails before anything is finished leaves no folder, or the one that it was to replace. That is kept
        beside it until the new one is complete.
        """
        with self._swapping():
            if overwrite and self.path.exists():
                if (self.path / LOCK).exists():
                    locked(self.path / LOCK, self.path).release()
                if is_set_aside(self.place) and not self.complete:  # what was to be replaced is not this
                    shutil.rmtree(self.place)
                else:
                    set_aside(self.place)
            self.place.mkdir(exist_ok=True)
            lock = locked(self.path / LOCK, self.path)
        try:
            text = json.dumps(requested, indent=2) + "\n"
            if Path(self.settings).suffix == ".yaml":
                text = yaml.safe_dump(json.loads(text), sort_keys=False, allow_unicode=True)
            write_atomic(self.path / self.settings, text)
            yield
        except BaseException:
            if not any((self.path / name).exists() for name in WORK):  # nothing to carry on with
                with self._swapping():
                    shutil.rmtree(self.place, ignore_errors=True)
                    sweep(self.place)
            raise
        finally:
            if self.complete:  # nobody will work here again
                make_readable(self.path)
                sweep(self.place)
                (self.path / LOCK).unlink(missing_ok=True)  # while it is held: the file of the next holder stays
            lock.release()

    @property
    def place(self) -> Path:
        """The folder itself: its path may be a link."""
        return self.path.resolve()

    @contextlib.contextmanager
    def _swapping(self) -> Iterator[None]:
        """Keep other processes from replacing or restoring the folder meanwhile."""
        self.place.parent.mkdir(parents=True, exist_ok=True)
        file = self.place.parent / f".{self.place.name}.swap.lock"
        with file_lock(file, timeout=60):
            try:
                yield
            finally:
                file.unlink(missing_ok=True)

    def has_stage(self, name: str) -> bool:
        """Whether a stage's result is stored, and whole."""
        return read_state(self.path / "stages" / f"{name}.json") is not None

    def stage(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the stored result of a stage; do its work and store it if there is none, or it is damaged."""
        file = self.path / "stages" / f"{name}.json"
        result = read_state(file)
        return write_state(file, work()) if result is None else result


def differences(stored: Mapping[str, Any], requested: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Name what differs between two settings, as `train.lr: 0.001 there, 0.0002 here`."""
    changes = []
    for key in dict.fromkeys([*stored, *requested]):
        old, new = stored.get(key), requested.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changes += differences(old, new, f"{prefix}{key}.")
        # A field that is younger than the stored run is no difference as long as it is off.
        elif old != new and (key in stored or new not in (None, False, 0, "none", {})):
            changes.append(f"{prefix}{key}: {old} there, {new} here")
    return changes
