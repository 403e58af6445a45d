"""Write the golden values, or compare with them: python tests/golden/make.py [--check] [SECTION ...]

A section is a function that returns JSON values; its values are in SECTION.json beside this file. See README.md.
"""

import contextlib
import csv
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parents[1]))
    os.environ.setdefault("HIPLORA_CACHE", tempfile.mkdtemp(prefix="hiplora-golden-"))
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402

from tests.tiny import save_tiny, tiny_llama, tiny_tokenizer, write_jsonl  # noqa: E402

torch.set_num_threads(1)

RELATIVE, ABSOLUTE = 1e-4, 1e-9  # of values; digests must be equal, and are compared on the same machine only
TABLES = 1e-5, 1e-3  # of pico's measurements: differences, ratios and bounds amplify the rounding of trainings
KL = 1e-7  # nats: what float32 log-probabilities leave of a divergence
DIFFERENCES = 1e-4  # percentage points: absolute, of differences of two scores, in which rounding is relatively larger
DIGEST = "sha256"  # keys that begin so hold digests
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
TEXT = (
    "In the summer the market stands by the harbour, where the ships bring bread, salt, wood and wool. "
    "From there a road goes north to the mill, and in the winter the water of the river is ice. "
)


# What values become in the files.


def rounded(value, digits=6):
    """A number to so many significant digits; booleans, texts and None as they are; containers throughout."""
    if isinstance(value, dict):
        return {str(key): rounded(inner, digits) for key, inner in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [rounded(inner, digits) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else str(value)
    return value


def digest(arrays, decimals=5):
    """The hash of arrays' values, rounded."""
    found = hashlib.sha256()
    for array in arrays:
        found.update((np.round(np.asarray(array, dtype=np.float64), decimals) + 0.0).tobytes())
    return found.hexdigest()[:16]


def sketch(updates):
    """Of each module's update (a function of its name): the Frobenius norm and three fixed random projections."""
    found = {}
    for module in sorted(updates):
        delta = updates[module].detach().double().numpy()
        draw = np.random.RandomState(7)
        found[module] = [np.linalg.norm(delta)]
        found[module] += [float((draw.uniform(-1, 1, delta.shape) * delta).sum()) for _ in range(3)]
    return rounded(found)


# What the sections are made of: every setting is explicit, so that another default changes nothing.

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "target_modules": ATTENTION}
HIP = LORA | {"init_weights": True, "principal_rank": 8, "svd_tolerance": 1e-4, "save_factors": True}
HIP |= {"stability_weight": 0.1, "stability_gamma": 1.0, "stability_mode": "gradient", "gain_lr_ratio": 1.0}
HIP |= {"relative_gains": False, "residual_projection": True, "principal_channel": True}
HIP |= {"basis": "weight", "basis_sides": "both", "projection": "hard"}
FUNCTION_AWARE = HIP | {"basis": "activation", "principal_channel": False, "target_modules": MLP}


def hip_config(**changes):
    from hiplora import HipLoraConfig

    return HipLoraConfig(**HIP | changes)


def lora_config(**changes):
    from peft import LoraConfig

    return LoraConfig(**LORA | changes)


def text_rows():
    ids = tiny_tokenizer()(TEXT * 6, add_special_tokens=False)["input_ids"]
    return [ids[start : start + 64] for start in range(0, 1024, 64)]


@contextlib.contextmanager
def folder_of_base():
    with tempfile.TemporaryDirectory() as place:
        yield Path(place), save_tiny(Path(place) / "base")


def save_adapter(base, folder, config, seed, size=1.0):
    """Write an adapter of the saved base, its A and B (or all that HiP-LoRA draws) at random."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    if config.peft_type == "LORA":
        draw = np.random.RandomState(seed)  # the same bits on every machine: DARE draws by them
        for parameter in model.parameters():
            if parameter.requires_grad:
                values = draw.uniform(-size, size, tuple(parameter.shape)).astype(np.float32)
                parameter.data.copy_(torch.from_numpy(values))
    model.save_pretrained(folder)
    return folder


# The sections.


def training():
    """Twenty steps on fixed batches: the losses, and what the adapter is then."""
    import peft

    import hiplora
    from tests.unit.adapters.samples import deltas

    def calibrated(changes, **options):
        config = hip_config(**FUNCTION_AWARE | changes)
        hiplora.calibrate(tiny_llama(), config, batch_size=8, **options)
        return config

    proximal = {"stability_mode": "proximal", "relative_gains": True, "gain_lr_ratio": 0.5}
    configs = {
        "lora": lora_config(),
        "hip paper": hip_config(),
        "hip function-aware": calibrated({}, rows=text_rows(), gradient_tokens=512),
        "hip function-aware, soft, on samples": calibrated(
            {"projection": "soft"}, tokens=512, seed=3, gradient_tokens=256
        ),
        "hip proximal, relative gains": hip_config(**proximal, principal_rank="energy:0.5"),
    }
    found = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny_llama(), config).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        draw, losses = np.random.RandomState(1), []
        for _ in range(20):
            batch = torch.from_numpy(draw.randint(0, 256, (2, 24)))
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        state = peft.get_peft_model_state_dict(model)
        updates = deltas(model.eval())
        found[name] = {
            "losses": rounded(losses),
            "norms": rounded({module: update.norm().item() for module, update in updates.items()}),
            "tensors": len(state),
            "sha256 of the state": digest(state[key].detach().float() for key in sorted(state)),
        }
    return found


def merging():
    """Every merge rule, and cutting down to a rank: of each module's merged update, its norm and three projections."""
    from hiplora.merging import RULES, merge

    density, scale = {"density": 0.3}, {"scale": 1.0}
    options = {"addition": {}, "ties": density | scale, "dare": {"density": 0.5, "rescale": True, "seed": 5}}
    options |= {"magnitude": density, "knots": density | scale, "tsv": scale | {"sv_reduction": None}, "iso-c": scale}
    assert set(options) == set(RULES), "a merge rule came or went: give its options here"
    found = {}
    with folder_of_base() as (place, base):
        loras = [save_adapter(base, place / f"lora{seed}", lora_config(), seed) for seed in (1, 2)]
        hips = [save_adapter(base, place / f"hip{seed}", hip_config(init_weights=False), seed) for seed in (1, 2)]
        merges = {f"{rule} of lora": (loras, rule, None) for rule in RULES}
        merges |= {f"{rule} of hip-lora": (hips, rule, None) for rule in ("addition", "ties", "knots", "tsv", "iso-c")}
        for kind, two in {"lora": loras, "hip-lora": hips}.items():
            merges[f"addition of {kind}, rank 6"] = two, "addition", 6
        for name, (adapters, rule, rank) in merges.items():
            merged = merge(adapters, rule, [0.75, 0.5], rank=rank, options=options[rule])
            found[name] = sketch({module: merged.delta(module) for module in merged.modules})
    return found


WORDS = ["rain", "stone", "river", "lamp", "cloud", "bread", "north", "seven"]
CHOICES = [
    {
        "question": f"Which of these goes with {WORDS[i % 8]} number {i}?",
        "choices": [WORDS[(i + j) % 8] * (1 + j % 2) for j in range(4)],
        "answer": i % 4,
    }
    for i in range(7)
]
BESIDE = "The {} is beside the {} since _ is {} years old."
DATA = {  # a task of each kind: letters, answers, choices in the context, a last word, a text, a number
    "mmlu_test": CHOICES,
    "arc_easy": CHOICES,
    "winogrande": [
        {"context": BESIDE.format(*WORDS[i : i + 2], i), "choices": WORDS[i : i + 2], "answer": i % 2}
        for i in range(6)
    ],
    "lambada": [{"context": f"On day {i} they saw the {WORDS[i]} and the", "answer": WORDS[i + 1]} for i in range(6)],
    "wikitext2_raw_valid": [{"text": " ".join(WORDS[i:] * 9) + f"\n = {i} = \n", "title": str(i)} for i in range(3)],
    "gsm8k_test": [
        {"question": f"What is {i} and {i}?", "answer": f"It is <<{i}+{i}>>.\n#### {2 * i}"} for i in range(6)
    ],
}


def evaluation():
    """`hiplora eval` of a base and two adapters, item by item; drift; and edits, with what they did elsewhere."""
    from hiplora.evaluation.evaluate import EvalSettings, evaluate

    with folder_of_base() as (place, base):
        for name, rows in DATA.items():
            write_jsonl(place / f"{name}.jsonl", rows)
        adapters = {
            "lora": save_adapter(base, place / "lora", lora_config(target_modules=["q_proj", "up_proj"]), 1, 0.3),
            "hip": save_adapter(base, place / "hip", hip_config(init_weights=False), 2),
        }
        suite = "mmlu,arc_easy,winogrande,lambada,wikitext,gsm8k"
        settings = EvalSettings(suite=suite, data=place, limit=5, seed=3, batch_size=4)
        results = evaluate(str(base), [f"{k}={v}" for k, v in adapters.items()], settings, place / "out.json")
        found = {
            "items": {task: told["items"] for task, told in results["tasks"].items()},
            "runs": results["runs"],
            "differences": results["differences"],
            "drift": {name: _drift(base, folder) for name, folder in adapters.items()},
        }
    return rounded(found | {"editing": _editing()})


def _drift(base, folder):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from hiplora.evaluation import BaseReference, measure_drift

    texts = {"prose": TEXT * 2, "words": [" ".join(WORDS), " ".join(reversed(WORDS))]}
    model = AutoModelForCausalLM.from_pretrained(base).requires_grad_(False).eval()
    reference = BaseReference.build(model, tiny_tokenizer(), texts, window=64, max_tokens=200)
    ids = torch.tensor([tiny_tokenizer()(TEXT)["input_ids"]])
    before = model(input_ids=ids).logits[0].argmax(-1)
    adapted = PeftModel.from_pretrained(model, folder).eval()
    after = adapted(input_ids=ids).logits[0].argmax(-1)
    drift = {
        name: {key: getattr(told, key) for key in ("kl", "perplexity_ratio", "tokens")}
        for name, told in measure_drift(adapted, reference).items()
    }
    return {**drift, "top-1 agreement": (before == after).double().mean().item()}


def _editing():
    """Edits of a tiny model, one after the other in batches: success, preference, locality."""
    from hiplora.editing import Edit, EditTraining, Question, run_edits

    kinds = ("Entity/Attribute", "Relation/Fact", "Temporal/Numeric")
    edits = [
        Edit(
            f"Thing {i} is", "cyan", new, f"thing {i}", kind, f"It, thing {i}, is", (Question(f"Box {i} is", "cyan"),)
        )
        for i, (new, kind) in enumerate(zip(("blue", "pink", "grey", "lime"), (*kinds, kinds[0]), strict=True))
    ]
    questions = [Question(f"Place {i} has a", word, f"place {i}") for i, word in enumerate(WORDS[:3])]
    training = EditTraining(steps=5, lr=2e-3, batch_size=4, weight_decay=0.01, max_grad_norm=1.0, seed=42)
    groups = [[0, 1], [2, 3]]
    found = {}
    for name, config in {
        "lora": lora_config(target_modules="all-linear"),
        "hip": hip_config(target_modules=[*ATTENTION, *MLP]),
    }.items():
        model = tiny_llama()
        model.generation_config.eos_token_id = None
        run = run_edits(model, tiny_tokenizer(), config, edits, training, questions, groups=groups, sequential=True)
        last = run["stages"][-1]["records"]
        found[name] = run["summary"] | {
            "log_probs": list(map(list, zip(last["log_prob_new"], last["log_prob_old"], strict=True))),
            "elsewhere": run["questions"]["log_prob"],
        }
    return found


OF_STAGES = ("average_accuracy", "backward_transfer", "forgetting", "learned_accuracy")


def metrics():
    """Every function of hiplora.metrics on fixed numbers."""
    from dataclasses import asdict

    from hiplora import metrics as m

    draw = np.random.RandomState(11)
    full = [[50.0, 20.0, 10.0], [45.0, 60.0, 12.0], [48.0, 52.0, 70.0]]
    accuracies = [[value if stage >= i else None for i, value in enumerate(row)] for stage, row in enumerate(full)]
    draw.uniform(-2, 2, (2, 9, 7))  # the values of metrics that are gone: what follows draws the same numbers
    sums, other = -draw.uniform(1, 9, (2, 8))
    single = [{"a": 60.0, "b": 40.0}, {"a": 62.0, "c": 0.0}, {"b": 50.0, "c": 30.0}]
    merged = [{"a": 55.0, "b": 39.0}, {"a": 50.0, "c": 0.0}, {"b": 45.0, "c": 33.0}]
    values = {
        name: [list(draw.uniform(0, 100, size) + shift) for size in (12, 9, 20)]
        for name, shift in (("one", 0.0), ("two", 5.0), ("three", -4.0))
    }
    boot = m.paired_bootstrap(values, replicates=1000, seed=0, level=0.95)
    one_seed = m.paired_bootstrap({k: v[:1] for k, v in values.items()}, replicates=1000, seed=0, level=0.9)
    yes, no = [True, False, True, True], [True, True, False, False]
    found = {
        **{name: [getattr(m, name)(matrix) for matrix in (accuracies, full)] for name in OF_STAGES},
        "answer_likelihood": [m.answer_likelihood(-3.5, 4), m.answer_likelihood(0.0005, 1)],
        "gold_probability": [m.gold_probability([-4.0, -2.5, -3.0, -900.0], gold) for gold in range(4)],
        "locality": [asdict(m.locality(yes, no)), asdict(m.locality(yes, no, sums[:4], other[:4]))],
        "mean_post_merge_drop": [m.mean_post_merge_drop(*two) for two in ((merged, single), (merged[0], single[0]))],
        "merge_fail": [m.merge_fail(merged, single, tau) for tau in (0.8, 0.9, 1.0)],
        "merge_instances": [
            m.merge_instances(["a", "b", "c", "d"], [2, 3], [1, 2], 5, 0),
            m.merge_instances(["a", "b", "c"], [2], [1], 5, 4),
        ],
        "paired_bootstrap": [
            {
                "mean": {name: asdict(interval) for name, interval in result.mean.items()},
                "difference": {" - ".join(pair): asdict(i) for pair, i in result.difference.items()},
                "p_value": {
                    f"{one} - {two}": m.sign_flip_p_value(values[one][:seeds], values[two][:seeds])
                    for one, two in result.difference
                },
            }
            for result, seeds in ((boot, 3), (one_seed, 1))
        ],
        "pass_at_k": [m.pass_at_k(n, c, k) for n, c, k in ((10, 3, 1), (10, 3, 5), (200, 7, 100), (5, 0, 2))],
        "retain": m.retain({"a": 50.0, "b": 60.0, "c": 70.0}, {"a": 80.0, "b": 55.0, "c": 71.0}, "a"),
        "sign_flip_p_value": [
            m.sign_flip_p_value(values["one"], values["two"], permutations=2000, seed=0),
            m.sign_flip_p_value([values["one"][1]], [values["three"][1]]),
        ],
        "student_margin": [m.student_margin(2.5, 3), m.student_margin(1.0, 12)],
        "DEFAULT_TAU": m.DEFAULT_TAU,
        "DEFAULT_TAUS": m.DEFAULT_TAUS,
    }
    return rounded(found)


LEFT_OUT = {"provenance", "overhead", "says", "paper", "target"}  # timings (a claim is about those) and words
MACHINES = {"throughput", "throughput ratio", "peak memory", "peak memory ratio", "factors"}
MEASURED = ("estimate", "low", "high", "sd", "seeds", "items", "p", "loss")
LABELS = ("protocol", "method", "domain", "form", "metric", "unit")


def pico():
    """The whole pico study: the report's measurements and claims, without timings, throughput and memory."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "study"
        environment = {**os.environ, "HIPLORA_CACHE": str(Path(place) / "cache"), "OMP_NUM_THREADS": "1"}
        hiplora = [sys.executable, "-W", "ignore", "-m", "hiplora", "study"]
        for words in (["run", "pico", "--workers", "2", "--allow-code-execution"], ["report", "pico"]):
            command = [*hiplora, *words, "--out", str(folder)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        return of_report(folder / "report")


def of_report(report):
    """The golden values of a report's folder."""
    rows = list(csv.DictReader((report / "measurements.csv").read_text().splitlines()))
    claims = pd.json_normalize(json.loads((report / "claims.json").read_text())).iloc[0].to_dict()
    return {
        "measurements": dict(sorted(_measurement(row) for row in rows if row["metric"] not in MACHINES)),
        "claims": {key: rounded(value) for key, value in claims.items() if not LEFT_OUT & {*key.split(".")}},
    }


def _measurement(row):
    """A row of the measurements: its label, and its numbers to five digits."""
    others = sorted(key for key in row if key not in (*MEASURED, *LABELS, "jobs", "machine"))
    label = [row[key] for key in LABELS] + [f"{key} {row[key]}" for key in others if row[key]]
    numbers = [rounded(float(row[key]), 5) if row[key] else None for key in MEASURED]
    while numbers[-1] is None:
        numbers.pop()
    return " | ".join(filter(None, label)), numbers


SECTIONS = {make.__name__: make for make in (training, merging, evaluation, metrics, pico)}


# Writing and comparing.


def machine():
    """What digests depend on."""
    from hiplora.provenance import provenance

    return {"processor": provenance()["machine"]["processor"], "torch": torch.__version__, "numpy": np.__version__}


def flat(value, where):
    """Yield every value of nested containers with its place."""
    if not isinstance(value, (dict, list)) or not value:
        yield where, value
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from flat(inner, f"{where}/{key}")


def near(where, one, two):
    if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in (one, two)):
        return one == two and type(one) is type(two)
    points = any(part in where for part in ("/differences/", " | pp", "/claims/"))
    absolute, relative = DIFFERENCES if points else KL if "drift." in where else ABSOLUTE, RELATIVE
    if where.startswith("pico/measurements"):
        absolute, relative = max(absolute, TABLES[0]), TABLES[1]
    return abs(one - two) <= absolute + relative * max(abs(one), abs(two))


def compare(expected, found, same_machine, where):
    """Return what differs, a line each."""
    expected, found = dict(flat(expected, where)), dict(flat(found, where))
    lines = [f"{place}: is only in one of them" for place in expected.keys() ^ found.keys()]
    for place in expected.keys() & found.keys():
        counts = same_machine or f"/{DIGEST}" not in place
        if counts and not near(place, expected[place], found[place]):
            lines.append(f"{place}: expected {expected[place]!r}, found {found[place]!r}")
    return lines


def check(name, values=None):
    """Return how a section, made anew unless it is given, differs from its file, a line each."""
    kept = json.loads((HERE / f"{name}.json").read_text())
    found = json.loads(json.dumps(SECTIONS[name]() if values is None else values))
    return sorted(compare(kept["values"], found, kept["machine"] == machine(), name))


def write(name):
    """Make a section and write its file."""
    note = " ".join(SECTIONS[name].__doc__.split())
    kept = {"machine": machine(), "note": note, "values": SECTIONS[name]()}
    text = json.dumps(kept, indent=1, ensure_ascii=False)
    lists = re.compile(r"\[\n[^][{}]*\]")  # a list of values goes on one line
    text = lists.sub(lambda found: json.dumps(json.loads(found[0]), ensure_ascii=False), text)
    (HERE / f"{name}.json").write_text(text + "\n")


def main(arguments):
    names = [name for name in arguments if name != "--check"] or list(SECTIONS)
    failed = False
    for name in names:
        if "--check" not in arguments:
            write(name)
            continue
        lines = check(name)
        failed = failed or bool(lines)
        print(f"{name}: {len(lines)} differences", *lines[:40], sep="\n  ")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
