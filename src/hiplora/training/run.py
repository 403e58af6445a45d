"""The folder of a run: who may write in it, what an interrupted run left there, when it is complete.

recipe.yaml           the resolved recipe; written first
metrics.jsonl         one row per logged step
checkpoints/          step-<n>, each whole or absent; run.json; the lock
adapter_model.safetensors, README.md, provenance.json
adapter_config.json   written last: where it is, the run is complete, and nothing loads without it
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from hiplora.errors import ConfigError
from hiplora.files import check_output_dir, write_atomic
from hiplora.recipes import TrainRecipe
from hiplora.training.adapters import CONFIG_FILE
from hiplora.training.checkpoints import all_checkpoints, flush, remove, sweep, writing

RECIPE_FILE = "recipe.yaml"
LAST = CONFIG_FILE


@dataclass(frozen=True)
class RunFolder:
    """The places of a run inside its output folder."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def start(self) -> Path:
        """Where a method that moves the base keeps its start."""
        return self.checkpoints / "start"

    @property
    def complete(self) -> bool:
        """Whether the run is finished: its last file is there."""
        return (self.path / LAST).is_file()

    @property
    def blank(self) -> bool:
        """Whether there is nothing in the folder but what a run makes before it writes its recipe."""
        if not self.path.is_dir():
            return False
        names = {path.name for path in self.path.iterdir() if path.suffix != ".part"}
        return names <= {self.checkpoints.name} and self.last_checkpoint is None

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest whole checkpoint, or None."""
        found = all_checkpoints(self.checkpoints)
        return found[-1] if found else None


def check_claim(run: RunFolder, recipe: TrainRecipe, resume: bool, overwrite: bool) -> None:
    """Check, without writing anything, that a run of `recipe` may work in a folder.

    It may if there is nothing there, if what is there may be overwritten, or if it is this recipe's own: an
    unfinished run goes on; a finished one is left as it is, with `resume`.

    Raises:
        ConfigError: it may not; the message says what is there and how to go on.
    """
    out = run.path
    if overwrite or not out.exists():
        check_output_dir(out, overwrite)
        return
    if run.complete and not resume:
        check_output_dir(out)
    stored = _stored_recipe(run)
    if stored is None:
        if not run.blank:
            check_output_dir(out)
        return
    if changes := _differences(stored, recipe_values(recipe)):
        state = "a finished" if run.complete else "an unfinished"
        raise ConfigError(
            f"--out {out}: holds {state} run of another recipe ({'; '.join(changes[:5])}); name another folder, put "
            "the recipe back to carry on, or pass --overwrite to start anew"
        )


@contextlib.contextmanager
def claimed(
    run: RunFolder, recipe: TrainRecipe, sources: Mapping[str, Any], overwrite: bool
) -> Iterator[None]:
    """Hold a run's folder: make it or clean it up, lock it, and check that the data are still the same.

    Raises:
        ConfigError: another process trains there, or the data changed since the run began.
    """
    if overwrite and run.checkpoints.is_dir():
        _locked(run).release()  # refuses if someone trains there
    if overwrite:
        remove(run.path)
    with writing(run.path):
        run.checkpoints.mkdir(parents=True, exist_ok=True)
    lock = _locked(run)
    try:
        sweep(run.path)
        sweep(run.checkpoints)
        _check_data(run, sources)
        with writing(run.path):
            write_atomic(run.checkpoints / "run.json", json.dumps({"data": sources}, indent=2))
            write_atomic(run.path / RECIPE_FILE, recipe_text(recipe))
        yield
    finally:
        lock.release()


def _locked(run: RunFolder) -> FileLock:
    lock = FileLock(run.checkpoints / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"--out {run.path}: another process is training there; wait for it or name another folder"
        ) from None
    return lock


@contextlib.contextmanager
def assembled(run: RunFolder) -> Iterator[Path]:
    """Yield a folder aside; when it is filled, its files take their places, the one that completes the run last."""
    aside = run.path / ".final.part"
    shutil.rmtree(aside, ignore_errors=True)
    with writing(run.path):
        aside.mkdir()
        try:
            yield aside
            flush(aside)
            names = sorted((path.name for path in aside.iterdir()), key=lambda name: (name == LAST, name))
            for name in names:
                (aside / name).replace(run.path / name)
            flush(run.path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def recipe_values(recipe: TrainRecipe) -> dict[str, Any]:
    """Return a recipe as plain values, without its output folder."""
    values = recipe.model_dump(mode="json", exclude={"out"})
    values["method"] = {"name": recipe.method.name, **values["method"]}
    return values


def recipe_text(recipe: TrainRecipe) -> str:
    """Write a recipe out as YAML, every default filled in."""
    head = "# The recipe of this run with every default filled in; `hiplora train` takes it as it is.\n"
    return head + yaml.safe_dump(recipe_values(recipe), sort_keys=False, allow_unicode=True)


def _stored_recipe(run: RunFolder) -> dict[str, Any] | None:
    try:
        value = yaml.safe_load((run.path / RECIPE_FILE).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return None
    return value if isinstance(value, dict) else None


def _check_data(run: RunFolder, sources: Mapping[str, Any]) -> None:
    try:
        stored = json.loads((run.checkpoints / "run.json").read_text(encoding="utf-8"))["data"]
    except (OSError, ValueError, KeyError):
        return
    now = json.loads(json.dumps(sources))
    changed = [name for name in {**stored, **now} if stored.get(name) != now.get(name)]
    if changed and run.last_checkpoint is not None:
        what = "the adapter that it started from" if changed == ["start"] else "the data"
        raise ConfigError(
            f"--out {run.path}: {what} changed since this run began; put back what was there to carry on, or pass "
            "--overwrite to start anew"
        )


def _differences(stored: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Name what differs between two recipes, as `train.lr: 0.001 there, 0.0002 here`."""
    changes = []
    for key in dict.fromkeys([*stored, *asked]):
        there, here = stored.get(key), asked.get(key)
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            changes += _differences(there, here, f"{prefix}{key}.")
        elif there != here:
            changes.append(f"{prefix}{key}: {there} there, {here} here")
    return changes
