"""Memory and time of merging adapters in the shapes of Llama-3.1-8B, rule by rule.

    python benchmarks/merge.py [--adapters 4] [--rank 16] [--targets attention] [--modules 2] [--json FILE]

The adapters are stock LoRA folders with random factors; there is no base model, and no more than one dense update is
formed at a time. Every rule runs in a process of its own. What is measured:

- rules that merge factors: `merge`, all of it, from the folders to the merged update;
- dense rules: `merge`, then the update of `--modules` modules of each shape, dropped when it is there. The time of all
  modules is scaled up from these, shape by shape, and both are in the record.

Times are seconds on the clock and CPU seconds; look at the latter where the machine has other work. Memory is what the
process needs at its peak beyond what it had after its imports. It is set against `2 × the largest module × adapters`
(in fp32), which is what a dense merge is meant to stay within, beyond the adapters' factors.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from side_by_side import options, timed, write

LAYERS = 32
ATTENTION = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096)}
MLP = {"gate_proj": (14336, 4096), "up_proj": (14336, 4096), "down_proj": (4096, 14336)}
TARGETS = {"attention": ATTENTION, "all": ATTENTION | MLP}
MIB = 2**20


def shapes_of(targets: str, layers: int) -> dict[str, tuple[int, int]]:
    """Shapes (out, in) of the adapted modules, by name."""
    return {
        f"model.layers.{layer}.{'self_attn' if name in ATTENTION else 'mlp'}.{name}": shape
        for layer in range(layers)
        for name, shape in TARGETS[targets].items()
    }


def write_adapter(folder: Path, shapes: dict[str, tuple[int, int]], rank: int, seed: int) -> None:
    """Write a stock LoRA adapter with random factors."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (m, n) in shapes.items():
        name = f"base_model.model.{module}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, n, generator=draw) / n**0.5
        tensors[f"{name}.lora_B.weight"] = 0.01 * torch.randn(m, rank, generator=draw)
    targets = sorted({module.rpartition(".")[2] for module in shapes})
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    config.base_model_name_or_path = "meta-llama/Llama-3.1-8B"
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def resident(what: str) -> int:
    """Bytes of this process: VmRSS, what is resident now, or VmHWM, the most there ever was."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(what))


def measure(rule: str, folders: list[str], per_shape: int, threads: int) -> dict:
    """Merge by one rule in this process; seconds, and bytes beyond those after the imports."""
    import torch

    import hiplora.adapters  # noqa: F401 - imported before memory is first read
    from hiplora.merging import RULES, merge

    home = RULES[rule]
    assert home.combine
    torch.set_num_threads(threads)
    torch.linalg.svd(torch.randn(8, 8))
    before = resident("VmRSS")
    update, spent = timed(lambda: merge(folders, method=rule))
    found = {"rule": rule, "kind": home.kind, "merge": spent, "total": spent}
    shapes = {module: tuple(update.shape(module)) for module in update.modules}
    if home.kind == "dense":
        found["factors_bytes"] = resident("VmRSS") - before
        found |= measure_dense(update, shapes, per_shape)
        found["total"] = {key: spent[key] + found["all_updates"][key] for key in spent}
    largest = 4 * max(m * n for m, n in shapes.values())
    found |= {"peak_bytes": resident("VmHWM") - before, "bound_bytes": 2 * largest * len(folders)}
    found["peak_over_bound"] = found["peak_bytes"] / found["bound_bytes"]
    if home.kind == "dense":
        beyond = found["peak_bytes"] - found["factors_bytes"]
        found["peak_beyond_factors_over_bound"] = beyond / found["bound_bytes"]
    return found


def measure_dense(update: Any, shapes: dict[str, tuple[int, int]], per_shape: int) -> dict:
    """Compute the updates of a few modules of each shape, and scale their time to all modules."""
    groups: dict[tuple[int, int], list[str]] = {}
    for module, shape in shapes.items():
        groups.setdefault(shape, []).append(module)
    rows = []
    scaled = {"seconds": 0.0, "cpu_seconds": 0.0}
    for shape, modules in groups.items():
        spent = [timed(lambda module=module: update.delta(module))[1] for module in modules[:per_shape]]
        for key in scaled:
            scaled[key] += statistics.mean(row[key] for row in spent) * len(modules)
        rows.append({"shape": shape, "modules": len(modules), "measured": spent})
    return {"shapes": rows, "all_updates": scaled}


def in_own_process(*arguments: Any) -> dict:
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import merge\n"
        "print(json.dumps(merge.measure(*json.loads(sys.argv[2]))))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(Path(__file__).parent), json.dumps(arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def show(found: dict) -> None:
    memory = f"{found['peak_bytes'] / MIB:.0f} MiB, {found['peak_over_bound']:.2f} of the bound"
    print(f"{found['rule']:10}{in_words(found['total'])}   {memory}", flush=True)
    if found["kind"] == "dense":
        measured = [spent for row in found["shapes"] for spent in row["measured"]]
        modules = sum(row["modules"] for row in found["shapes"])
        took = {key: sum(spent[key] for spent in measured) for key in measured[0]}
        print(f"{'':10}{in_words(took)}   measured, on {len(measured)} of {modules} modules", flush=True)
        held, beyond = found["factors_bytes"] / MIB, found["peak_beyond_factors_over_bound"]
        print(f"{'':29}{held:.0f} MiB of these are the adapters; {beyond:.2f} of the bound beyond them")


def in_words(spent: dict[str, float]) -> str:
    return f"{spent['seconds']:9.1f} s ({spent['cpu_seconds']:.1f} s CPU)"


def main() -> None:
    """Run all rules, print what they take, and write JSON where asked."""
    from hiplora.merging import RULES

    parser = options(__doc__)
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES))
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", choices=list(TARGETS), default="attention")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--modules", type=int, default=2, help="of each shape, for dense rules")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    shapes = shapes_of(args.targets, args.layers)
    everything = 4 * sum(m * n for m, n in shapes.values())
    bound = 2 * 4 * max(m * n for m, n in shapes.values()) * args.adapters
    print(f"{args.adapters} adapters of rank {args.rank} on {len(shapes)} modules, {args.threads} thread(s)")
    print(f"bound: {bound / MIB:.0f} MiB; all updates of one adapter as matrices: {everything / MIB:.0f} MiB\n")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        folders = [str(Path(folder) / f"adapter-{seed}") for seed in range(args.adapters)]
        for seed, adapter in enumerate(folders):
            write_adapter(Path(adapter), shapes, args.rank, seed)
        for rule in args.rules:
            results.append(in_own_process(rule, folders, args.modules, args.threads))
            show(results[-1])
    setting = {name: value for name, value in vars(args).items() if name not in ("json", "rules")}
    setting |= {"shapes": "Llama-3.1-8B", "all_updates_of_one_adapter_bytes": everything}
    write(args.json, {"benchmark": "merge", "setting": setting, "results": results})


if __name__ == "__main__":
    main()
