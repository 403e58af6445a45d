"""Invented merge reports for tests of the page: plausible in shape and size, measured by nobody."""

import itertools
import math
import random

TYPES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")


def side(mean, chance):
    return {"mean": mean, "largest_cosine": min(1.0, math.sqrt(mean) * 1.5), "chance": chance}


def pair(adapters, left, right, cosine):
    score = math.sqrt(left * right) * (1 - cosine) / 2
    return {"adapters": list(adapters), "left": side(left, 0.028), "right": side(right, 0.028),
            "cosine": cosine, "score": score}  # fmt: skip


def module(name, layer, count, rng):
    pairs = [
        pair(places, 0.5 * rng.random(), 0.4 * rng.random(), rng.gauss(0, 0.1))
        for places in itertools.combinations(range(count), 2)
    ]
    worst = max(pairs, key=lambda p: p["score"], default=None)
    unrelated = 1 / math.sqrt(max(count, 1))
    return {
        "module": name,
        "layer": layer,
        "type": name.rpartition(".")[2],
        "outputs": 576,
        "inputs": 576,
        "adapters": list(range(count)),
        "ranks": [16] * count,
        "norms": [1.0] * count,
        "sum_norm": count * unrelated,
        "norm_ratio": unrelated * rng.uniform(0.9, 1.1),
        "unrelated": unrelated,
        "magnitude": 100.0,
        "sign_conflict": (1 - unrelated) * rng.uniform(0.9, 1.1),
        "pairs": pairs,
        "score": worst["score"] if worst else None,
        "worst": worst["adapters"] if worst else None,
    }


def merge_report(names=("medicine", "law", "code"), layers=30, types=TYPES, **changes):
    rng = random.Random(0)
    count = len(names)
    rows = [
        module(f"model.layers.{layer}.{kind}", layer, count, rng) for layer in range(layers) for kind in types
    ]
    scored = sorted((row for row in rows if row["score"]), key=lambda row: -row["score"])
    matrix = lambda value: [[None if i == j else value for j in range(count)] for i in range(count)]  # noqa: E731
    return {
        "schema": 1,
        "kind": "merge-report",
        "base": "smollm2-135m",
        "adapters": [
            {"name": name, "weight": 1.0, "method": "lora", "modules": len(rows), "source": f"runs/{name}",
             "sha256": "ab" * 32}
            for name in names
        ],
        "modules": rows,
        "most_conflicting": [row["module"] for row in scored[:10]],
        "pairs": {"left": matrix(0.25), "right": matrix(0.2), "cosine": matrix(-0.4), "modules": matrix(len(rows))},
        "totals": {
            "modules": len(rows), "shared": len(rows) if count > 1 else 0,
            "left": 0.25 if count > 1 else None, "right": 0.2 if count > 1 else None,
            "left_chance": 0.028, "right_chance": 0.028, "cosine": -0.01 if count > 1 else None,
            "norm_ratio": 0.58, "unrelated": 0.577, "sign_conflict": 0.41, "unrelated_sign_conflict": 0.423,
        },
        "settings": {"rank_tolerance": 1e-3},
        "merge": {"schema": 1, "kind": "merge", "method": "addition", "adapters": [f"runs/{name}" for name in names],
                  "export": {"to": "lora", "path": "runs/both", "modules": [{"module": "m", "rank": 32}]}},
        "provenance": {"commit": "0" * 40, "libraries": {"torch": "2.13.0"}, "machine": {"cores": 2}},
    } | changes  # fmt: skip


def interval(estimate, low, high):
    return {"estimate": estimate, "low": low, "high": high}


def evaluation(**changes):
    return {
        "tasks": {
            "GSM8K": {"metric": "exact match", "before": 41.2, "after": 30.0,
                      "difference": interval(-11.2, -15.1, -7.3)},
            "ScienceQA": {"metric": "accuracy", "before": 71.2, "after": 70.9, "difference": interval(-0.3, -1.1, 0.5)},
        },
        "merge_fail": {"0.95": interval(0.5, 0.3, 0.7), "0.9": interval(0.25, 0.1, 0.45)},
        "mean_drop": interval(5.8, 3.9, 7.7),
        "notes": ["Scores are means over three seeds."],
    } | changes  # fmt: skip


def stress_report():
    """Long names, one layer, gaps, infinities and markup: what makes labels collide."""
    names = ("a", "an adapter with <b>a name</b> & more of it, on and on", "日本語", "$x_1$", "e")
    report = merge_report(names, layers=1, types=("experts.0.a_projection_with_a_long_name", "q_proj"))
    report["modules"].append(module("lm_head", None, len(names), random.Random(1)))
    report["modules"][0]["pairs"][0] |= {"left": None, "right": None, "cosine": None, "score": None}
    report["modules"][1]["norm_ratio"] = math.nan
    report["pairs"]["cosine"][0][1] = 1.0
    report["pairs"]["cosine"][0][2] = None
    report["evaluation"] = evaluation(
        tasks={
            "a task with a rather long name <i>x</i>": {"metric": "a metric with a rather long name", "before": 1e4,
                                                       "after": math.inf, "difference": interval(1e4, -1e4, 2e4)},
            "not measured": {"metric": "", "before": 12.5, "after": None, "difference": None},
            "all zero": {"metric": "m", "before": 0, "after": 0, "difference": interval(0, 0, 0)},
        },
        merge_fail={str(tau): interval(tau, 0.0, 1.0) for tau in (0.99, 0.0, 1.0)},
        notes=["A note with <script>alert(1)</script>."],
    )  # fmt: skip
    return report
