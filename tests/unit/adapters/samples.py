"""Adapters that were really trained for a few steps, on tiny models made on the spot."""

import json
import subprocess
import sys
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import hiplora
from hiplora import HipLoraConfig
from tests.tiny import VOCABULARY

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PROMPTS = torch.randint(0, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))


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
    settings = {
        "r": 4,
        "lora_alpha": 12,
        "principal_rank": 6,
        "basis": "weight",
        "principal_channel": True,
        "target_modules": ATTENTION,
        "lora_dropout": 0.0,
    }
    return HipLoraConfig(**settings | changes)


def base_model(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


def train(model, steps=3, seed=0, lr=2e-2):
    """Move every trainable parameter by a few optimizer steps; the tuner's hooks retract by themselves."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.vocab_size
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    model.train()
    for _ in range(steps):
        batch = torch.randint(0, vocabulary, (2, 16), generator=generator)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def trained(base_dir, config, seed=0, **options):
    """A PEFT model over a fresh copy of the base, trained."""
    torch.manual_seed(seed)
    return train(peft.get_peft_model(base_model(base_dir, **options), config), seed=seed)


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
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer"):
            delta = module.get_delta_weight("default").detach()
            transposed = type(module.base_layer).__name__ == "Conv1D"
            found[name.removeprefix("base_model.model.")] = delta.T if transposed else delta
    return found


def product(update, module):
    A, B = update.factors[module]
    return B @ A


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
        config = GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=256, eos_token_id=257
        )
        GPT2LMHeadModel(config).save_pretrained(path)
    return Path(path)


def leaky(base_dir, path):
    """A HiP-LoRA adapter folder whose residual channel was pushed into the protected directions."""
    folder, model = saved(base_dir, path, hip_config())
    name, layer = next(iter(hiplora.tuner.hip_layers(model)))

    def push(tensors):
        key = f"base_model.model.{name}.hiplora_B.weight"
        tensors[key] = tensors[key] + layer.hiplora_U["default"][:, :1]

    edit_tensors(folder, push)
    return folder, name


def adalora(base_dir, seed=0, **changes):
    """A PEFT model whose AdaLoRA adapter was pruned from rank 6 to 3 on average, unevenly."""
    settings = {
        "init_r": 6,
        "target_r": 3,
        "tinit": 1,
        "tfinal": 2,
        "deltaT": 1,
        "total_step": 8,
        "lora_alpha": 9,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
    }
    torch.manual_seed(seed)
    model = peft.get_peft_model(base_model(base_dir), peft.AdaLoraConfig(**settings | changes))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    for step in range(8):
        batch = torch.randint(0, model.config.vocab_size, (2, 16))
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model.eval()
