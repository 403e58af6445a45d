"""What only a GPU machine can tell, in one script: python benchmarks/gpu/run.py --out FOLDER [--data FOLDER] [--tiny]

The parts, the most valuable first, each in its own process under a time limit, each result written when it is done:

    contract   training, leak, saving, merging and export on the device, in float32, bfloat16, under autocast, compiled
    step       step time and peak memory on Llama-3.1-8B's shapes with random bfloat16 weights: LoRA, HiP-LoRA, OSF
    calibrate  calibration, sampling included, and certified factors of that model
    frontier   `benchmarks.frontier` on SmolLM2-135M, where its weights and `--data` are at hand

It needs torch, transformers, peft, accelerate, safetensors, numpy, scipy, jaxtyping, platformdirs, filelock, wrapt, and
the checkout on PYTHONPATH (`src` and the root); no network. `--tiny` runs every part at sizes for a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, set_seed

import hiplora
from hiplora.spectral import truncated_svd
from hiplora.tuner import CalibrationStore

# Hidden and MLP width, layers, heads, heads of keys and values, vocabulary.
SHAPES = {"8b": (4096, 14336, 32, 32, 8, 128256), "tiny": (64, 160, 2, 4, 2, 512)}
MLP = ["gate_proj", "up_proj", "down_proj"]
LIMITS = {"contract": 60, "step": 150, "calibrate": 120, "frontier": 150}  # seconds


def llama(size: str, layers: int | None = None, dtype: Any = None) -> Any:
    """Return a random model of Llama-3.1-8B's shapes, or a tiny one, on the device."""
    hidden, mlp, all_layers, heads, keys, vocabulary = SHAPES[size]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers or all_layers, num_attention_heads=heads,
        num_key_value_heads=keys, vocab_size=vocabulary,
    )  # fmt: skip
    with torch.device(device()):
        return AutoModelForCausalLM.from_config(config, dtype=dtype or torch.bfloat16).eval()


def device() -> str:
    """Return where to run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def configs(size: str) -> dict[str, Callable[[Any], Any]]:
    """Return the tuners side by side on the MLPs, with about as many trainable parameters: each makes its config."""
    rank, principal = (16, 32) if size == "8b" else (2, 4)
    shared = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "target_modules": MLP, "task_type": "CAUSAL_LM"}

    def function_aware(model: Any) -> Any:
        config = hiplora.HipLoraConfig(**shared, principal_rank=principal)
        rows = torch.randint(0, model.config.vocab_size, (16, 256), generator=torch.Generator().manual_seed(0))
        hiplora.calibrate(model, config, rows=rows, gradient_tokens=1024)
        return config

    return {
        "lora": lambda model: peft.LoraConfig(**shared),
        "hiplora": function_aware,
        "hiplora-paper": lambda model: hiplora.HipLoraConfig(preset="paper", **shared, principal_rank=principal),
    }


def contract(args: argparse.Namespace) -> dict[str, Any]:
    """Return, per precision and preset, "ok" or what failed."""
    found = {}
    for precision in ("float32", "bfloat16", "autocast", "compiled"):
        for name, make in configs("tiny").items():
            if name != "lora":
                try:
                    found[f"{precision} {name}"] = check(make, precision)
                except Exception as error:  # the point is to go on with the next one
                    found[f"{precision} {name}"] = f"{type(error).__name__}: {error}"[:300]
    return {"checks": found, "torch": torch.__version__}


def check(make: Callable[[Any], Any], precision: str) -> str:
    """Train, save, load, merge and export one adapter; return "ok" or what is wrong."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    set_seed(0)
    base = llama("tiny", dtype=dtype)
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    model = peft.get_peft_model(base, make(base))
    ids = torch.randint(0, 512, (4, 32), generator=torch.Generator().manual_seed(1)).to(device())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    run = torch.compile(model) if precision == "compiled" else model
    cast = torch.autocast(device(), dtype=torch.bfloat16) if precision == "autocast" else contextlib.nullcontext()
    losses = []
    for _ in range(8):
        with cast:
            loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-3
    problems = []
    if not losses[-1] < losses[0]:
        problems.append(f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f}")
    leak, limit = hiplora.max_leak(model), 1e-2 if dtype == torch.bfloat16 else 1e-5
    if leak > limit:
        problems.append(f"leak {leak:.1e}, expected at most {limit}")

    def logits(network: Any) -> Any:
        with torch.no_grad():
            return network.eval()(input_ids=ids).logits.float()

    def same(one: Any, two: Any, what: str) -> None:
        apart = ((one - two).norm() / two.norm()).item()
        if apart > tolerance:
            problems.append(f"{what}: logits differ by {apart:.1e}")

    trained = logits(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/adapter")
        hiplora.export.save_as_lora(model, f"{folder}/lora")
        model.merge_adapter()
        same(logits(model), trained, "merged")
        model.unmerge_adapter()
        bare = model.unload()
        for name, value in bare.state_dict().items():
            if not torch.equal(value, weights[name]):
                problems.append(f"{name} changed")
        for kind in ("adapter", "lora"):
            loaded = peft.PeftModel.from_pretrained(bare, f"{folder}/{kind}")
            same(logits(loaded), trained, f"{kind} loaded")
            bare = loaded.unload()
    return "; ".join(problems) or "ok"


def step(args: argparse.Namespace) -> dict[str, Any]:
    """Return seconds a step and peak memory of each tuner, and the ratios to LoRA; OSF on four layers, beside LoRA."""
    size = "tiny" if args.tiny else "8b"
    found: dict[str, Any] = {}
    for rows, length in ((4, 512), (1, 2048), (16, 512)) if not args.tiny else ((2, 16),):
        shape = f"{rows} × {length}"
        found[shape] = {name: time_step(size, make, rows, length) for name, make in configs(size).items()}
        print(shape, json.dumps(found[shape]), flush=True)
    few = 4 if size == "8b" else 1
    tuners = {
        "lora": configs(size)["lora"],
        "osf": lambda model: peft.OSFConfig(task_type="CAUSAL_LM", target_modules=MLP),
    }
    rows, length = (2, 16) if args.tiny else (4, 512)
    found[f"{few} layers, {rows} × {length}"] = {
        name: time_step(size, make, rows, length, few) for name, make in tuners.items()
    }
    for timed in found.values():
        for measured in timed.values():
            measured["ratio to LoRA"] = measured["seconds"] / timed["lora"]["seconds"]
    return found


def time_step(size: str, make: Callable[[Any], Any], rows: int, length: int, layers: int | None = None) -> dict:
    """Return the median of ten steps, and the peak memory of the device."""
    model = llama(size, layers)
    adapted = peft.get_peft_model(model, make(model)).train()
    adapted.enable_input_require_grads()
    ids = torch.randint(0, model.config.vocab_size, (rows, length)).to(device())
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(13):
        synchronize()
        begun = time.perf_counter()
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        seconds.append(time.perf_counter() - begun)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    count = sum(p.numel() for p in parameters)
    del model, adapted, optimizer, parameters
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"seconds": statistics.median(seconds[3:]), "peak_bytes": peak, "trainable": count}


def calibrate(args: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of the default calibration, and of the attention matrices' certified factors."""
    size = "tiny" if args.tiny else "8b"
    model = llama(size)
    config = hiplora.HipLoraConfig(task_type="CAUSAL_LM", principal_rank=4 if args.tiny else 32)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        options = {"tokens": 200} if args.tiny else {}
        hiplora.calibrate(model, config, store=CalibrationStore(Path(folder)), **options)
        synchronize()
    found: dict[str, Any] = {"calibration_seconds": time.perf_counter() - begun}
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    weights = [module.weight for name, module in model.named_modules() if name.endswith(names)]
    begun, residual = time.perf_counter(), 0.0
    for weight in weights:
        residual = max(residual, float(truncated_svd(weight.detach(), config.principal_rank).residual))
    found |= {"factored": len(weights), "factor_seconds": time.perf_counter() - begun, "largest_residual": residual}
    return found


def frontier(args: argparse.Namespace) -> dict[str, Any]:
    """Run the long frontier until the limit; its runs are files of their own in OUT/frontier."""
    if args.data is None:
        return {"skipped": "no --data"}
    from benchmarks.frontier import RECIPE

    recipe, command = args.recipe or RECIPE, [sys.executable, "-m", "benchmarks.frontier", "run"]
    if args.tiny:
        recipe = args.out / "frontier-tiny.yaml"
        whole = yaml.safe_load((args.recipe or RECIPE).read_text())
        whole["measure"] |= {"steps": [1, 2], "scales": [0.5], "heldout_rows": 4, "drift_tokens": 64, "items": 2}
        whole["blocks"] = [{**whole["blocks"][0], "seeds": [0]}]
        recipe.write_text(yaml.safe_dump(whole))
    done = subprocess.run([*command, "--recipe", recipe, "--data", args.data, "--out", args.out / "frontier"])
    return {"status": done.returncode, "runs": len(list((args.out / "frontier").glob("*.json")))}


PARTS = {"contract": contract, "step": step, "calibrate": calibrate, "frontier": frontier}


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    return {"device": name, **versions}


def main() -> int:
    """Run the parts, each in its own process, or with --part one of them in this."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--recipe", type=Path, help="another recipe of the frontier")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--part", choices=PARTS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part:
        begun = time.perf_counter()
        result = {**machine(), "tiny": args.tiny, "result": PARTS[args.part](args)}
        result["seconds"] = time.perf_counter() - begun
        (args.out / f"{args.part}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result, indent=1))
        return 0
    failed = False
    for part, limit in LIMITS.items():
        command = [sys.executable, __file__, "--part", part, *sys.argv[1:]]
        limit = 10 * limit if args.tiny else limit  # a CPU may be slow
        print(f"== {part}, at most {limit} s", flush=True)
        try:
            status = subprocess.run(command, timeout=limit, env={**os.environ, "HF_HUB_OFFLINE": "1"}).returncode
        except subprocess.TimeoutExpired:
            status = f"not done after {limit} s"
        print(f"== {part}: {'done' if status == 0 else status}", flush=True)
        failed = failed or status != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
