"""What a streaming merge takes in memory, measured in a process of its own."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hiplora.adapters.shards import TensorSpec, row_blocks, write_shards
from hiplora.training.memory import CLEAR

ADAPTERS, LAYERS = 3, 10
HIDDEN, INTERMEDIATE = 1152, 4608
LARGEST = 4 * HIDDEN * INTERMEDIATE
# Blocks of rows and the check in float64, the model without its weights, and the adapters' own factors.
CONSTANT = 64 << 20

MERGE = """
import json, os, sys
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the peak is that of resident memory
import torch
from transformers import AutoTokenizer, LlamaForCausalLM
from hiplora.adapters import AdapterUpdate, save_dense
from hiplora.adapters.base_weights import BaseWeights
from hiplora.training.memory import peak_bytes, reset_peak

base, out, adapters = sys.argv[1], sys.argv[2], int(sys.argv[3])

def random_adapter(seed):
    draw = torch.Generator().manual_seed(seed)
    factors = {
        module: (torch.randn(8, n, generator=draw) / n, torch.randn(m, 8, generator=draw))
        for module, (m, n) in shapes.items()
    }
    return AdapterUpdate(base, "lora", {}, factors)

class DenseSum:
    base, kind, config, fingerprints, extras, source = base, "merged", {}, {}, {}, "a dense sum"
    def __init__(self, updates):
        self.updates, self.modules, self.shape = updates, updates[0].modules, updates[0].shape
    def check_leak(self):
        pass
    def delta(self, module):
        deltas = [update.delta(module) for update in self.updates]
        for delta in deltas[1:]:
            deltas[0] += delta
        return deltas[0]

shapes = {
    name.removesuffix(".weight"): spec.shape
    for name, spec in BaseWeights(base).stored.items()
    if name.endswith("_proj.weight")
}
reset_peak()
baseline = peak_bytes()
report = save_dense(DenseSum([random_adapter(seed) for seed in range(adapters)]), out, max_shard_size="120MB")
print(json.dumps({"extra": peak_bytes() - baseline, "files": report.files, "streamed": report.streamed}))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Llama of about 0.4 GB in bf16 with a small vocabulary; one block of random weights repeats in it."""
    folder = tmp_path_factory.mktemp("large")
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=12,
        num_key_value_heads=6,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    specs = {name: TensorSpec(tuple(p.shape), torch.bfloat16) for name, p in model.named_parameters()}
    noise = (0.02 * torch.randn(1 << 20)).bfloat16()

    def blocks(name):
        shape = specs[name].shape
        for rows in row_blocks(shape):
            block = (rows.stop - rows.start, *shape[1:])
            yield noise[: torch.Size(block).numel()].reshape(block)

    write_shards(folder, specs, blocks, "250MB")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not CLEAR.exists(), reason="peak memory is read from Linux's /proc")
def test_a_dense_merge_takes_less_than_twice_its_largest_module_per_adapter(base, tmp_path):
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    limit = 2 * LARGEST * ADAPTERS + CONSTANT
    assert size > 1.8 * limit, "the model is too small to show anything"
    command = [sys.executable, "-W", "ignore", "-c", MERGE, str(base), str(tmp_path / "out"), str(ADAPTERS)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=300)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["streamed"]
    assert len(found["files"]) > 2
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert abs(written - size) < 1 << 20
    mib = {"measured": found["extra"], "limit": limit, "the model": size}
    said = ", ".join(f"{name} {number / 2**20:.0f} MiB" for name, number in mib.items())
    print(said)
    assert found["extra"] < limit, said
