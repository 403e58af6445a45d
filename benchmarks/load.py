"""Loading an adapter over a base of Llama-3.1-8B's shapes, and switching, against stock LoRA of the same rank r + k.

    python benchmarks/load.py [--layers 2] [--rounds 5] [--json FILE]

The base has random bf16 weights and a few of the 32 layers, and is in memory; both adapters are on its MLPs, and their
files in the page cache. Measured are the first adapter (`PeftModel.from_pretrained`), a second one (`load_adapter`),
and switching between the two. Times are in seconds; each contender's turn comes first once a round.
"""

import gc
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from side_by_side import options, timed, turns, write
from transformers import LlamaConfig, LlamaForCausalLM

from hiplora import HipLoraConfig

RANK, PRINCIPAL_RANK = 16, 32
MLP = ["gate_proj", "up_proj", "down_proj"]
SIZES = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}


def base_model(layers: int) -> Any:
    """Make the base: random weights in bf16."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=1024, num_hidden_layers=layers)).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def save_adapters(base: Any, folder: Path) -> None:
    """Write an adapter of each kind; of the basis nothing but its shape matters here."""
    shared = {"target_modules": MLP, "task_type": "CAUSAL_LM", "lora_dropout": 0.0}
    configs = {
        "LoRA": LoraConfig(r=RANK + PRINCIPAL_RANK, **shared),
        "HiP-LoRA": HipLoraConfig(r=RANK, principal_rank=PRINCIPAL_RANK, basis="weight", svd_tolerance=1e-2, **shared),
    }
    for name, config in configs.items():
        model = get_peft_model(base, config)
        model.save_pretrained(str(folder / name))
        base = model.unload()


def measure(base: Any, folder: Path) -> dict[str, dict[str, float]]:
    """Return the time of each step of one contender, on the clock and of all cores; the base is left bare."""
    times = {}

    def step(name: str, work: Callable[[], Any]) -> Any:
        gc.collect()
        result, times[name] = timed(work)
        return result

    model = step("load the first", lambda: PeftModel.from_pretrained(base, str(folder)))
    step("load a second", lambda: model.load_adapter(str(folder), "second"))
    step("switch", lambda: model.set_adapter("second"))
    model.unload()
    return times


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    base, contenders = base_model(arguments.layers), ("LoRA", "HiP-LoRA")
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as folder:
        save_adapters(base, Path(folder))
        for name in contenders:  # the first load of a process imports
            measure(base, Path(folder) / name)
        for _, name in turns(contenders, arguments.rounds):
            rows[name].append(measure(base, Path(folder) / name))
    steps = {}
    for step in rows["LoRA"][0]:
        seconds = {name: [row[step]["seconds"] for row in rows[name]] for name in contenders}
        ratios = [ours / theirs for ours, theirs in zip(seconds["HiP-LoRA"], seconds["LoRA"], strict=True)]
        steps[step] = {"seconds": seconds, "ratio": statistics.median(ratios), "ratios": ratios}
        medians = ", ".join(f"{name} {statistics.median(values):.3f} s" for name, values in seconds.items())
        print(f"{step}: {medians}; {steps[step]['ratio']:.2f} times")
    setting = {"shapes": "Llama-3.1-8B", "layers": arguments.layers, "modules": MLP, "rank": RANK}
    setting |= {"principal_rank": PRINCIPAL_RANK, "rounds": arguments.rounds}
    write(arguments.json, {"benchmark": "load", "setting": setting, "steps": steps})


if __name__ == "__main__":
    main()
