"""Adapters that were really trained for a few steps, on tiny models made on the spot."""

import json
import subprocess
import sys
from pathlib import Path

import peft
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import hiplora
from hiplora import HipLoraConfig
from tests.tiny import VOCABULARY

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PROMPTS = torch.randint(0, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
PREFIX = "base_model.model."
Q0 = "model.layers.0.self_attn.q_proj"

STOCK_ONLY = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, prompts, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.load(prompts)).logits, out)
assert "hiplora" not in sys.modules, "this process was to load stock PEFT only"
"""


def logits_of_stock_process(base, adapter, folder):
    """Logits of an adapter over its base, from a process that never imports hiplora."""
    torch.save(PROMPTS, folder / "prompts.pt")
    files = [base, adapter, folder / "prompts.pt", folder / "logits.pt"]
    subprocess.run([sys.executable, "-c", STOCK_ONLY, *map(str, files)], check=True, capture_output=True, timeout=300)
    return torch.load(folder / "logits.pt")


def hip_config(**changes):
    ranks = {"r": 4, "lora_alpha": 12, "principal_rank": 6, "lora_dropout": 0.0}
    how = {"basis": "weight", "principal_channel": True, "target_modules": ATTENTION}
    return HipLoraConfig(**ranks | how | changes)


CONFIGS = {
    "one": hip_config(),
    "two": hip_config(),
    "three": hip_config(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"]),
    "other rank": hip_config(principal_rank=4),
    "other rank of o": hip_config(principal_rank=4, target_modules=["o_proj"]),
    "proj": hip_config(principal_channel=False),
    "proj of q": hip_config(principal_channel=False, target_modules=["q_proj"]),
    "free": hip_config(residual_projection=False),
    "hip patterns": hip_config(
        rank_pattern={"q_proj": 7, "layers.1.self_attn.v_proj": 1},
        alpha_pattern={"k_proj": 2},
        principal_rank_pattern={"o_proj": 3},
    ),
    "lora": LoraConfig(r=3, lora_alpha=9, target_modules=ATTENTION),
    "mlp": LoraConfig(r=3, lora_alpha=9, target_modules=["up_proj"], use_rslora=True),
    "patterns": LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
        alpha_pattern={"layers.1.self_attn.q_proj": 3},
    ),
    "head": LoraConfig(r=4, target_modules=["q_proj", "lm_head"]),  # PEFT saves a copy of the head's frozen weight
    "whole": LoraConfig(r=4, lora_alpha=16, target_modules=ATTENTION, modules_to_save=["lm_head"]),
    "hip whole": hip_config(modules_to_save=["lm_head"]),
    "hip head": hip_config(target_modules=["q_proj", "lm_head"]),
    "one layer": hip_config(layers_to_transform=[1]),
}


class Adapters(dict):
    """Folders of adapters of one base model by name, each trained when first asked for; `models` has them live."""

    def __init__(self, base, root):
        super().__init__()
        self.base, self.root, self.models = base, root, {}

    def __missing__(self, name):
        if name == "adalora":
            self.models[name] = adalora(self.base, seed=9)
            self.models[name].save_pretrained(self.root / name)
        elif name == "pissa":
            self.models[name] = pissa(self.base, self.root)
        else:
            _, self.models[name] = saved(self.base, self.root / name, CONFIGS[name], seed=list(CONFIGS).index(name))
        self[name] = self.root / name
        return self[name]


def base_model(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


def train(model, steps=3, seed=0, lr=2e-2):
    """Move every trainable parameter by a few optimizer steps; the tuner's hooks retract by themselves."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for step in range(steps):
        batch = torch.randint(0, model.config.vocab_size, (2, 16), generator=generator)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        if hasattr(model.base_model, "update_and_allocate"):
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model.eval()


def trained(base_dir, config, seed=0, **options):
    """A PEFT model over a fresh copy of the base, trained."""
    torch.manual_seed(seed)
    base = base_model(base_dir, **options)
    if getattr(config, "basis", None) == "activation":
        hiplora.calibrate(base, config, rows=torch.randint(0, 256, (6, 40)))
    return train(peft.get_peft_model(base, config), seed=seed)


def saved(base_dir, path, config, seed=0, **options):
    """An adapter folder, and the model that it was saved from."""
    model = trained(base_dir, config, seed, **options)
    model.save_pretrained(path)
    return Path(path), model


@torch.no_grad()
def logits(model, prompts=PROMPTS):
    return model(input_ids=prompts).logits


def deltas(model):
    """ΔW of every adapted layer, as (out, in), by module name, as PEFT computes it."""
    matrices = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer"):
            delta = module.get_delta_weight("default").detach()
            transposed = type(module.base_layer).__name__ == "Conv1D"
            matrices[name.removeprefix(PREFIX)] = delta.T if transposed else delta
    return matrices


def product(update, module):
    A, B = update.factors[module]
    return B @ A


def assert_is(update, expected, rtol=1e-5, atol=1e-6):
    """An update is these matrices, by module, and they are not all zero."""
    assert set(update.factors) == set(expected)
    for module, delta in expected.items():
        torch.testing.assert_close(product(update, module), delta, rtol=rtol, atol=atol)
    assert max(delta.norm() for delta in expected.values()) > 0


def weighted_sum(updates, weights):
    """Σ w · ΔW by module, dense."""
    total = {}
    for update, weight in zip(updates, weights, strict=True):
        for module in update.factors:
            total[module] = total.get(module, 0) + weight * product(update, module)
    return total


def edit_config(folder, **changes):
    """Rewrite settings of an adapter's configuration."""
    file = Path(folder) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder, change):
    """Rewrite an adapter's tensors: `change` gets and alters the dictionary."""
    file = Path(folder) / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def save_tiny_gpt2(path):
    """A tiny GPT-2: transposed weights (Conv1D), tied embeddings, checkpoint names without a prefix."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
        GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=256, eos_token_id=257)).save_pretrained(path)
    return Path(path)


def leaky(base_dir, path):
    """A HiP-LoRA adapter folder whose residual channel was pushed into the protected directions."""
    folder, model = saved(base_dir, path, hip_config())
    name, layer = next(iter(hiplora.tuner.hip_layers(model)))

    def push(tensors):
        key = f"{PREFIX}{name}.hiplora_B.weight"
        tensors[key] = tensors[key] + layer.hiplora_U["default"][:, :1]

    edit_tensors(folder, push)
    return folder, name


def adalora(base_dir, seed=0, **changes):
    """A PEFT model whose AdaLoRA adapter was pruned from rank 6 to 3 on average, unevenly."""
    settings = {"init_r": 6, "target_r": 3, "tinit": 1, "tfinal": 2, "deltaT": 1, "total_step": 8, "lora_alpha": 9}
    settings |= {"target_modules": ["q_proj", "v_proj", "down_proj"], **changes}
    torch.manual_seed(seed)
    model = peft.get_peft_model(base_model(base_dir), peft.AdaLoraConfig(**settings))
    return train(model, steps=8, seed=seed, lr=5e-2)


def pissa(base_dir, root):
    """A PiSSA model, and its adapter as the difference to its start, as PEFT saves it."""
    config = LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION, init_lora_weights="pissa")
    model = peft.get_peft_model(base_model(base_dir), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(root / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    train(model, seed=11)
    model.save_pretrained(root / "pissa", path_initial_model_for_weight_conversion=root / "start")
    return model
