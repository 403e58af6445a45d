"""Step time and peak memory of HiP-LoRA against stock PEFT LoRA, side by side in one run.

    python benchmarks/step.py [--preset function-aware] [--rounds 15] [--json FILE]

Each round times one optimizer step of the frozen base (forward and backward only, the floor), of LoRA and of HiP-LoRA
(r = 16, k = 32) with a preset of its own modules, on the same tokens, in an order that rotates, so that drift of the
machine hits all alike. The ratio printed is the median of the per-round ratios. Memory is the peak resident size of a
fresh process per method.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from side_by_side import options, timed, turns, write

METHODS = ("base", "lora", "hiplora")


def make_step(method: str, preset: str, dropout: float, name: str, batch: int, length: int) -> Callable[[], float]:
    """Return a function that does one training step and gives its loss."""
    import peft
    import torch

    import hiplora.models
    from hiplora import HipLoraConfig
    from hiplora.tuner import default_targets

    torch.manual_seed(0)
    model, _ = hiplora.models.load(name)
    ids = torch.randint(0, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))
    shared = {"r": 16, "lora_alpha": 32, "lora_dropout": dropout, "task_type": "CAUSAL_LM"}
    shared["target_modules"] = sorted(default_targets(model, preset))
    if method == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(**shared))
    elif method == "hiplora":
        config = HipLoraConfig(preset=preset, principal_rank=32, **shared)
        if config.basis == "activation":
            hiplora.calibrate(model, config, rows=ids, gradient_tokens=256)
        model = peft.get_peft_model(model, config)
    else:
        model.requires_grad_(False)
    # Gradients flow down to the first adapter in the adapted models; the floor lets them flow as far.
    model.enable_input_require_grads()
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4) if trainable else None

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())

    return step


def time_steps(dropout: float, args: argparse.Namespace) -> dict:
    """Time the three methods in alternation; seconds per step and per-round ratios."""
    steps = {m: make_step(m, args.preset, dropout, args.model, args.batch, args.length) for m in METHODS}
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {m: [] for m in METHODS}
    for _, method in turns(METHODS, args.rounds):
        seconds[method].append(timed(steps[method])[1]["seconds"])
    medians = {m: statistics.median(s) for m, s in seconds.items()}
    ratios = sorted(h / r for h, r in zip(seconds["hiplora"], seconds["lora"], strict=True))
    return {
        "dropout": dropout,
        "rounds": args.rounds,
        "seconds": medians,
        "seconds_fastest": {m: min(s) for m, s in seconds.items()},
        "ratio_hiplora_lora": statistics.median(ratios),
        "ratio_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        "overhead_over_base": {m: medians[m] / medians["base"] for m in METHODS},
    }


def peak_memory(method: str, dropout: float, args: argparse.Namespace) -> int:
    """Peak resident bytes of a process that trains a few steps."""
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv[1]); import step as s\n"
        "run = s.make_step(sys.argv[2], sys.argv[3], float(sys.argv[4]), sys.argv[5], *map(int, sys.argv[6:]))\n"
        "for _ in range(3): run()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    values = [Path(__file__).parent, method, args.preset, dropout, args.model, args.batch, args.length]
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, values)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def main() -> None:
    """Run the comparison, print it, and write JSON where asked."""
    parser = options(__doc__)
    parser.add_argument("--preset", default="function-aware", choices=("function-aware", "paper"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dropouts", type=float, nargs="+", default=[0.0, 0.05])
    args = parser.parse_args()
    results = []
    peak_memory("hiplora", 0.0, args)  # its calibration is cached then, and is not in the peak of the next
    # Before this process grows: a child's peak, as Linux counts it, begins at its parent's.
    memories = {d: {m: peak_memory(m, d, args) for m in METHODS} for d in args.dropouts}
    for dropout, memory in memories.items():
        timing = time_steps(dropout, args)
        ratio = memory["hiplora"] / memory["lora"]
        sizes = f"{memory['hiplora'] / 1e9:.2f} / {memory['lora'] / 1e9:.2f} GB"
        results.append({**timing, "peak_bytes": memory, "memory_ratio_hiplora_lora": ratio})
        s, q = timing["seconds"], timing["ratio_quartiles"]
        print(f"dropout {dropout}: " + ", ".join(f"{m} {s[m]:.3f} s" for m in METHODS))
        print(f"  step time, HiP-LoRA / LoRA: {timing['ratio_hiplora_lora']:.3f} (quartiles {q[0]:.3f}–{q[1]:.3f})")
        print(f"  peak memory, HiP-LoRA / LoRA: {ratio:.3f} ({sizes})")
    setting = {name: getattr(args, name) for name in ("model", "preset", "batch", "length")}
    setting |= {"r": 16, "k": 32, "dtype": "float32"}
    write(args.json, {"benchmark": "step", "setting": setting, "results": results}, seed=0)


if __name__ == "__main__":
    main()
