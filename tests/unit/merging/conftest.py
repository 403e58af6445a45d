import peft
import pytest
from peft import LoraConfig

from tests.unit.adapters.samples import ATTENTION, adalora, base_model, hip_config, saved, train


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
        "patterns": LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "down_proj"],
            rank_pattern={"down_proj": 2},
            alpha_pattern={"layers.1.self_attn.q_proj": 3},
        ),
    }
    folders = {
        name: saved(tiny_model_dir, root / name, config, seed=i)[0] for i, (name, config) in enumerate(configs.items())
    }
    adalora(tiny_model_dir, seed=9).save_pretrained(root / "adalora")
    return folders | {"adalora": root / "adalora", "pissa": pissa(tiny_model_dir, root)}


def pissa(base_dir, root):
    """A PiSSA adapter as the difference to its start, as PEFT saves it."""
    config = LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION, init_lora_weights="pissa")
    model = peft.get_peft_model(base_model(base_dir), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(root / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    train(model, seed=11)
    model.save_pretrained(root / "pissa", path_initial_model_for_weight_conversion=root / "start")
    return root / "pissa"
