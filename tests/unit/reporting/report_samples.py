"""Invented results for tests of the report: plausible in shape and size, measured by nobody."""

import math
import random

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
TEXTS = ("built-in prose", "built-in code", "Python documentation")


def allocation(method, layers=30, k=32, types=MODULES, seed=0):
    rng = random.Random(f"{method}-{seed}")
    rows = []
    for layer in range(layers):
        for kind in types:
            sigma = [
                9.0 * (1 + layer / layers) * (i + 1) ** -0.55 * rng.uniform(0.97, 1.03) for i in range(k)
            ]
            scale = 0.004 if method.startswith("HiP") else 0.03
            gains = [scale * rng.gauss(0, 1) * (1.0 if method.startswith("HiP") else s**0.3) for s in sigma]
            inside = 0.01 + 0.02 * rng.random() if method.startswith("HiP") else 0.12 + 0.1 * rng.random()
            left, right, both = (
                (inside,) * 3 if method.startswith("HiP") else (inside, inside * 0.8, inside * 0.2)
            )
            rows.append(
                {"module": f"model.layers.{layer}.self_attn.{kind}", "layer": layer, "type": kind,
                 "norm": rng.uniform(0.8, 1.3), "left": left, "right": right, "both": both,
                 "sigma": sigma, "gains": gains}
            )  # fmt: skip
    return rows


def method(name, after, kl, seconds=200.0, layers=30, steps=120):
    rng = random.Random(name)
    curve = [
        {"step": s + 1, "loss": after + 0.1 + 1.2 * math.exp(-s / 20) + rng.gauss(0, 0.08)}
        for s in range(steps)
    ]
    return {
        "trainable_parameters": 1_843_200 if name == "LoRA" else 1_847_040,
        "seconds": seconds,
        "tokens": 120_000,
        "peak_memory_bytes": 2_300_000_000,
        "heldout_loss_before": 2.414,
        "heldout_loss_after": after,
        "curve": curve,
        "drift": drift(kl),
        "allocation": allocation(name, layers),
    }


def drift(kl, texts=TEXTS):
    return {
        text: {"kl": kl * (1 + i / 2), "perplexity_ratio": 1 + kl * (1 + i) * 0.7, "tokens": 2048}
        for i, text in enumerate(texts)
    }


def compare_results(**changes):
    results = {
        "schema": 1,
        "kind": "compare",
        "title": "HiP-LoRA against LoRA on GSM8K",
        "model": "smollm2-135m",
        "created": "2026-01-02T03:04:05+00:00",
        "data": {
            "source": "gsm8k_train.jsonl",
            "train_examples": 512,
            "heldout_examples": 64,
            "sha256": "ab" * 32,
        },
        "settings": {
            "LoRA": {"train": {"lr": 2e-4, "steps": 120}, "method": {"name": "lora", "r": 16}},
            "HiP-LoRA": {
                "train": {"lr": 2e-4, "steps": 120},
                "method": {"name": "hiplora", "r": 16, "k": 32},
            },
        },
        "provenance": {
            "commit": "0" * 40,
            "libraries": {"torch": "2.13.0", "peft": "0.21.2"},
            "machine": {"system": "Linux", "cores": 2},
            "seeds": [42],
        },
        "methods": {
            "LoRA": method("LoRA", 1.412, 0.081, 191.0),
            "HiP-LoRA": method("HiP-LoRA", 1.427, 0.0124, 196.0),
        },
        "notes": [],
    }
    return results | changes


def edit_method(alone, merged, survival, kl, with_drift=True):
    return {
        "single": [
            {"set": name, "success": value, "drift": drift(kl * 0.6 * (1 + i / 5), TEXTS[:2])}
            for i, (name, value) in enumerate(alone.items())
        ],
        "merged": {"success": merged, "overall": sum(merged.values()) / len(merged), "survival": survival,
                   "drift": drift(kl, TEXTS[:2])},
        "export": {"max_module_difference": 2.4e-7, "max_logit_difference": 3.1e-5, "rank": 48,
                   "path": "demo-out/exported"},
    }  # fmt: skip


def demo_results(**changes):
    results = compare_results(kind="demo", title="Two sets of edits, trained apart and added together")
    results["edits"] = {
        "sets": [{"name": "capitals", "count": 16}, {"name": "inventions", "count": 16}],
        "methods": {
            "LoRA": edit_method(
                {"capitals": 1.0, "inventions": 0.9375}, {"capitals": 0.25, "inventions": 0.3125}, 0.29, 1.42
            ),
            "HiP-LoRA": edit_method(
                {"capitals": 1.0, "inventions": 1.0}, {"capitals": 0.875, "inventions": 0.8125}, 0.844, 0.162
            ),
        },
        "base_success": {"capitals": 0.0625, "inventions": 0.0},
    }
    return results | changes


def inspection(**changes):
    rows = allocation("LoRA", layers=30)
    for row in rows:
        row["leak"] = None
    return {
        "schema": 1,
        "kind": "inspection",
        "adapter": "runs/lora",
        "base": "smollm2-135m",
        "method": "LoRA",
        "principal_rank": 32,
        "modules": rows,
        "summary": {"touched": 0.31},
    } | changes


def stress_results():
    """Everything at once that makes labels collide: five methods, long names, gaps, infinities, one layer."""
    names = ("LoRA", "Proj-LoRA", "PiSSA", "HiP-LoRA", "HiP-LoRA with the activation basis and rank 256")
    texts = (
        "a file of mine with a rather long name that goes on and on and on.txt",
        "$x_1$ & <b>bold</b>",
        "日本語のテキスト",
    )
    results = demo_results(
        title="A title with <script>alert(1)</script> & an ampersand, long enough to wrap on a phone"
    )
    results["methods"] = {}
    for index, name in enumerate(names):
        row = method(name, 1.4 + index / 50, 0.1 / (index + 1) ** 2, 100.0 * 40**index, layers=1, steps=7)
        row["drift"] = drift(0.1 / (index + 1) ** 2, texts)
        row["allocation"] = allocation(
            name, 1, 8, ("a_projection_with_a_long_name_of_its_own.dense_4h_to_h", "lm_head")
        )
        row["allocation"][1]["layer"] = None
        results["methods"][name] = row
    results["methods"]["LoRA"]["drift"][texts[0]]["perplexity_ratio"] = math.inf
    results["methods"]["LoRA"]["curve"][3]["loss"] = math.nan
    results["methods"]["PiSSA"]["drift"].pop(texts[1])
    results["methods"]["PiSSA"]["heldout_loss_after"] = None
    results["methods"]["HiP-LoRA"]["drift"][texts[1]]["kl"] = math.nan
    for row in results["methods"]["Proj-LoRA"]["allocation"]:
        row["gains"] = [0.0] * 8
    sets = {"a set of edits with a long name, for a label that must be shortened": 16, "dates": 16}
    first, second = sets
    results["edits"] = {
        "sets": [{"name": name, "count": count} for name, count in sets.items()],
        "methods": {
            name: edit_method(
                {first: 1.0, second: index / 5}, {first: 0.5, second: 0.01}, index / 5, 2.0 / (index + 1)
            )
            for index, name in enumerate(names)
        },
        "base_success": {first: None, second: 1.0},
    }
    results["notes"] = ["A note with <i>markup</i>."]
    return results
