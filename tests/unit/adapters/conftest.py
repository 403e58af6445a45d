import pytest

from tests.unit.adapters.samples import hip_config, saved


@pytest.fixture(scope="session")
def hip(tiny_model_dir, tmp_path_factory):
    """A trained HiP-LoRA adapter: its folder and its model. Read them, never change them."""
    return saved(tiny_model_dir, tmp_path_factory.mktemp("hip") / "adapter", hip_config())
