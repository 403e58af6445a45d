import pytest
from peft import LoraConfig

from tests.unit.export.samples import ATTENTION, hip_config, saved


@pytest.fixture(scope="session")
def adapters(tiny_model_dir, tmp_path_factory):
    """Folders of adapters of one base model, trained apart, by name. Read them, never change them."""
    root = tmp_path_factory.mktemp("adapters")
    configs = {
        "one": hip_config(),
        "two": hip_config(),
        "three": hip_config(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"]),
        "other rank": hip_config(principal_rank=4),
        "proj": hip_config(principal_channel=False),
        "lora": LoraConfig(r=3, lora_alpha=9, target_modules=ATTENTION),
        "mlp": LoraConfig(r=3, lora_alpha=9, target_modules=["up_proj"], use_rslora=True),
    }
    return {
        name: saved(tiny_model_dir, root / name, config, seed=i)[0]
        for i, (name, config) in enumerate(configs.items())
    }
