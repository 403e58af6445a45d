"""What every test gets: caches of its own, no hub, one thread, fixed seeds, and shapes checked as declared."""

import gc
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

# Before anything imports torch or hiplora. A pytest-xdist worker inherits these from the process that
# started it; then the real cache is the one that the first process saw, and the temporary one is shared.
if "HIPLORA_TEST_REAL_CACHE" not in os.environ:
    from hiplora.files import cache_dir

    os.environ["HIPLORA_TEST_REAL_CACHE"] = str(cache_dir())
    os.environ["HIPLORA_CACHE"] = _OWN_CACHE = tempfile.mkdtemp(prefix="hiplora-test-cache-")
else:
    _OWN_CACHE = None
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that runs the tests in the background has them ignore Ctrl-C, and so would the processes that tests
# start in order to interrupt them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from jaxtyping import install_import_hook

install_import_hook("hiplora.spectral", "beartype.beartype")

import numpy as np
import pytest
import torch

from tests.tiny import save_tiny

torch.set_num_threads(1)

REAL_MODEL = Path(os.environ["HIPLORA_TEST_REAL_CACHE"]) / "models" / "smollm2-135m"


def pytest_configure(config):
    """Let `hiplora.models` find the real model, already fetched, in the temporary cache."""
    link = Path(os.environ["HIPLORA_CACHE"]) / "models" / REAL_MODEL.name
    if _OWN_CACHE and REAL_MODEL.is_dir():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(REAL_MODEL)


def pytest_unconfigure(config):
    """Remove the temporary cache once the process that made it is done."""
    if _OWN_CACHE:
        shutil.rmtree(_OWN_CACHE, ignore_errors=True)


_frozen = 0  # modules there were when what is imported was last taken out of the garbage collector's sight


def pytest_runtest_setup(item):
    """Spare every collection a look at what the libraries' imports left: each training ends with one."""
    global _frozen
    if len(sys.modules) > _frozen + 100:
        gc.collect()
        gc.freeze()
        _frozen = len(sys.modules)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the real SmolLM2-135M-Instruct; mark the test `real_model` as well."""
    if not REAL_MODEL.is_dir():
        pytest.skip("SmolLM2-135M is not in the cache: run `make model`")
    return REAL_MODEL


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory) -> Path:
    """Folder of a tiny random Llama with its tokenizer (seed 0, untied); read it, never write to it."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder in place of the hub: repositories are copied into it once."""

    class Hub:
        def create_repo(self, name, private, exist_ok):
            assert private

        def upload_folder(self, repo_id, folder_path, ignore_patterns):
            shutil.copytree(folder_path, tmp_path / "hub" / repo_id)

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    return tmp_path / "hub"


@pytest.fixture(scope="session")
def adapters(tiny_model_dir, tmp_path_factory):
    """Adapters of the tiny Llama, each trained when first asked for; read them, never change them."""
    from tests.unit.adapters.samples import Adapters

    return Adapters(tiny_model_dir, tmp_path_factory.mktemp("adapters"))
