"""The long frontier: learning against drift, over methods, rates, seeds, steps and scales of the finished adapter.

    python -m benchmarks.frontier plan   --data FOLDER --out FOLDER
    python -m benchmarks.frontier run    --data FOLDER --out FOLDER [--block main ...] [--model MODEL] [--device auto]
    python -m benchmarks.frontier spread --data FOLDER --out FOLDER --to FOLDER
    python -m benchmarks.frontier report --out FOLDER --to FOLDER

`run` is one bare training loop on torch, transformers and PEFT, so that it runs on any machine, with or without a GPU.
A run is one JSON file, written when it is done: a series goes on where it stopped, and several processes share it.
`spread` measures the finished adapters again, on text from more places, to see what the choice of text does.
`report` turns the files into one tidy table (`records.csv`: run, task, method, rate, seed, step, scale, metric, value),
the comparison at equal learning and its figure. `--data` holds the JSON lines that the functions below name.

Learning is the held-out loss (nats per token of the answers). Drift is KL(base ‖ adapted) a token on three texts that
no run trains or calibrates on, and on the task's own prompts. Abilities are items of five benchmarks, base and adapted
paired by item: the right choice preferred, and its log-likelihood.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import peft
import torch
import yaml
from torch import Tensor

from hiplora import HipLoraConfig
from hiplora.data.rows import read_rows as read_places
from hiplora.evaluation import BaseReference, encode, heldout_loss, measure_drift, response_log_probs
from hiplora.evaluation.likelihood import by_length, pad_left
from hiplora.files import file_lock, write_atomic
from hiplora.models import load
from hiplora.provenance import provenance
from hiplora.tuner import default_targets, sampled_rows

RECIPE = Path(__file__).with_suffix(".yaml")
Pair = tuple[str, str]
CLIP, KL_TOKENS = 1.0, 128
SPREAD = {"documents": 12, "window": 256}  # of each text, and tokens of each document


class Run(NamedTuple):
    """One training: what, how, how fast, from which seed."""

    task: str
    method: str
    rate: float
    seed: int
    abilities: bool = False

    @property
    def name(self) -> str:
        return f"{self.task}-{self.method}-lr{self.rate:g}-seed{self.seed}"


def runs(recipe: dict[str, Any], blocks: Sequence[str] | None) -> list[Run]:
    """Return the runs of the recipe's blocks in order: seed by seed, so that every method has its first one early."""
    found: dict[str, Run] = {}
    for block in recipe["blocks"]:
        if not blocks or block["name"] in blocks:
            axes = itertools.product(block["seeds"], block["tasks"], block["rates"], block["methods"])
            for seed, task, rate, method in axes:
                run = Run(task, method, float(rate), seed, block.get("abilities", False))
                found.setdefault(run.name, run)
    return list(found.values())


# Data: rows to train on, texts to measure on, items of abilities


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return all rows of a data file."""
    return [row for _, row in read_places(path)]


def task_pairs(task: str, data: Path) -> tuple[list[Pair], list[Pair]]:
    """Return (prompt, answer) to train on and to hold out."""
    if task == "gsm8k":
        parts = (read_rows(data / f"gsm8k_{part}.jsonl.gz") for part in ("train", "test"))
        train, held = ([(f"Question: {r['question']}\nAnswer:", f" {r['answer']}") for r in rows] for rows in parts)
        return train, held
    if task == "code":
        rows = [row for row in read_rows(data / "codealpaca.jsonl.gz") if not row["input"] and row["output"].strip()]
        pairs = [(f"Instruction: {row['instruction']}\nResponse:", f" {row['output']}") for row in rows]
        return pairs[200:], pairs[:200]
    raise SystemExit(f"task {task!r} is unknown; expected gsm8k or code")


def drift_texts(data: Path, documents: int = 0) -> dict[str, Any]:
    """Return the texts that no run trains or calibrates on: whole, or `documents` of each, spread over its corpus."""
    prose = "".join(row["text"] for row in read_rows(data / "wikitext2_raw_valid.jsonl.gz"))
    code = [row["prompt"] + row["canonical_solution"] for row in read_rows(data / "humaneval.jsonl")]
    german = [row["de"] for row in read_rows(data / "flores_dev.jsonl.gz")]
    if not documents:
        return {"wikitext": prose, "python": "\n".join(code), "german": "\n".join(german)}
    corpora = {
        "wikitext": re.split(r"^(?= = [^=].* = $)", prose, flags=re.MULTILINE)[1:],  # at the titles of articles
        "python": ["\n".join(code[start : start + 3]) for start in range(0, len(code), 3)],
        "german": ["\n".join(german[start : start + 10]) for start in range(0, len(german), 10)],
    }
    return {name: [parts[i * len(parts) // documents] for i in range(documents)] for name, parts in corpora.items()}


def ability_items(data: Path, count: int) -> dict[str, list[tuple[list[Pair], int]]]:
    """Return per benchmark so many items: (prompt, answer) of every choice, and the right one's index.

    They are the first ones, but of BoolQ, which is sorted by its answers, from all over the file.
    """
    question = "Question: {question}\nAnswer:"
    prompts = {"hellaswag": "{context}", "piqa": question, "arc_easy": question}
    prompts |= {"boolq": "{passage}\nQuestion: {question}?\nAnswer:", "lambada": "{context}"}
    found: dict[str, list[tuple[list[Pair], int]]] = {}
    for name, prompt in prompts.items():
        found[name] = []
        rows = read_rows(data / f"{name}.jsonl.gz")
        for row in rows[:: max(len(rows) // count, 1) if name == "boolq" else 1][:count]:
            choices, right = (row["choices"], row["answer"]) if "choices" in row else ([row["answer"]], 0)
            found[name].append(([(prompt.format(**row), f" {choice}") for choice in choices], right))
    return found


def fitting(tokenizer: Any, pairs: list[Pair], count: int, most: int) -> list[Any]:
    """Return the first `count` tokenized rows of at most so many tokens."""
    encoded = (encode(tokenizer, *pair) for pair in pairs)
    return list(itertools.islice((example for example in encoded if len(example.ids) <= most), count))


# One run

_OF_THE_LOOP = ("kl", "replay", "token_weight")


def make_config(model: Any, method: dict[str, Any]) -> Any:
    """Return the PEFT configuration of a method of the recipe; every low-rank update is scaled by 2."""
    settings = {key: value for key, value in method.items() if key not in _OF_THE_LOOP}
    tuner, targets = settings.pop("tuner"), settings.pop("targets")
    presets = {"mlp": "function-aware", "attention": "paper"}
    settings["target_modules"] = "all-linear" if targets == "all" else sorted(default_targets(model, presets[targets]))
    if tuner == "osf":
        return peft.OSFConfig(task_type="CAUSAL_LM", **settings)
    kind = HipLoraConfig if tuner == "hiplora" else peft.LoraConfig
    return kind(lora_alpha=2 * settings["r"], lora_dropout=0.0, task_type="CAUSAL_LM", **settings)


class Bench:
    """The base model with what every run needs, loaded once."""

    def __init__(self, recipe: dict[str, Any], model: str, data: Path, out: Path, device: str):
        self.recipe, self.chosen, self.data, self.out = recipe, recipe["measure"], data, out
        self.model, self.tokenizer = load(model)
        self.model.to(device)
        self.name = model
        self.build = functools.partial(BaseReference.build, self.model, self.tokenizer)
        self.reference = self.build(drift_texts(data), max_tokens=self.chosen["drift_tokens"])
        self.items = ability_items(data, self.chosen["items"])
        self.replayed: list[Tensor] | None = None

    def examples(self, task: str) -> tuple[list[Any], list[Any]]:
        """Return the tokenized rows to train on and to hold out, none longer than the recipe's `max_tokens`."""
        end, most = self.tokenizer.eos_token, self.chosen["max_tokens"]
        train, held = ([(prompt, answer + end) for prompt, answer in pairs] for pairs in task_pairs(task, self.data))
        rows = fitting(self.tokenizer, train, 4 * max(self.chosen["steps"]), most)
        return rows, fitting(self.tokenizer, held, self.chosen["heldout_rows"], most)

    def sampled(self) -> list[Tensor]:
        """Return rows that the bare model wrote, for replay and the KL penalty; sampled once."""
        if self.replayed is None:
            self.replayed = list(sampled_rows(self.model, 10_000))
        return self.replayed

    def adapt(self, run: Run) -> Any:
        """Put a fresh adapter on the model."""
        config = make_config(self.model, self.recipe["methods"][run.method])
        torch.manual_seed(run.seed)
        return peft.get_peft_model(self.model, config)

    def run(self, run: Run) -> dict[str, Any]:
        """Train and measure; the model is bare again afterwards."""
        method, (train, held) = self.recipe["methods"][run.method], self.examples(run.task)
        sampled = self.sampled() if "kl" in method or "replay" in method else []
        prompts = "\n\n".join(prompt for prompt, _ in task_pairs(run.task, self.data)[1][:40])
        own = self.build({"task": prompts}, max_tokens=self.chosen["drift_tokens"] // 2)
        started = time.perf_counter()
        adapted = self.adapt(run)
        prepared = time.perf_counter() - started
        trainable, points = sum(p.numel() for p in adapted.parameters() if p.requires_grad), []
        try:
            loss = Loss(method, sampled, run.seed)
            for done in trained(adapted, train, run.rate, run.seed, self.chosen, loss):
                if (step := done["step"]) in self.chosen["steps"]:
                    points.append({"step": step, "scale": 1.0, **self.measure(adapted, held, own)})
            for scale in self.chosen["scales"] if method["tuner"] != "osf" else ():
                with scaled(adapted, scale):
                    points.append({"step": step, "scale": scale, **self.measure(adapted, held, own)})
            adapted.save_pretrained(str(self.adapter(run)))
        finally:
            self.model = adapted.unload()
        return {
            **run._asdict(),
            "settings": method,
            "measure": self.chosen,
            "trainable_parameters": trainable,
            "preparation_seconds": prepared,
            "training_seconds": done["seconds"],
            "points": points,
        }

    def adapter(self, run: Run) -> Path:
        """Return the folder of a finished run's adapter."""
        return self.out / "adapters" / run.name

    def abilities_of_base(self) -> dict[str, Any]:
        """Measure the abilities of the bare model."""
        return {"model": self.name, "abilities": self.measure_abilities(self.model)}

    def abilities_of(self, run: Run) -> dict[str, Any]:
        """Measure the abilities of a finished run's adapter; the model is bare again afterwards."""
        adapted = peft.PeftModel.from_pretrained(self.model, str(self.adapter(run)))
        try:
            return {**run._asdict(), "abilities": self.measure_abilities(adapted)}
        finally:
            self.model = adapted.unload()

    def spread_of(self, run: Run) -> dict[str, Any]:
        """Measure a finished run's adapter at every scale on documents spread over the texts' corpora."""
        (_, held), step, points = self.examples(run.task), max(self.chosen["steps"]), []
        adapted = peft.PeftModel.from_pretrained(self.model, str(self.adapter(run)))
        try:
            for scale in (*self.chosen["scales"], 1.0):
                with scaled(adapted, scale):
                    points.append({"step": step, "scale": scale, **self.measure(adapted, held)})
        finally:
            self.model = adapted.unload()
        return {**run._asdict(), "measure": {**self.chosen, **SPREAD}, "points": points}

    def measure(self, adapted: Any, held: list[Any], own: Any = None) -> dict[str, Any]:
        """Return the held-out loss, the drift on every text, and the share of greedy tokens that changed."""
        drift = measure_drift(adapted.eval(), self.reference)
        if own is not None:
            drift |= measure_drift(adapted, own)
        return {
            "heldout_loss": heldout_loss(adapted, held),
            "kl": {name: text.kl for name, text in drift.items()},
            "greedy_changed": {name: text.greedy_changed for name, text in drift.items()},
        }

    @torch.no_grad()
    def measure_abilities(self, model: Any) -> dict[str, Any]:
        """Return per benchmark and item whether it is solved, and the right answer's log-likelihood a token.

        Of several choices the one with the highest log-likelihood a token counts; without choices (LAMBADA), the
        greedy continuation.
        """
        found: dict[str, Any] = {}
        for name, items in self.items.items():
            examples = [encode(self.tokenizer, *pair) for pairs, _ in items for pair in pairs]
            scores: dict[int, float] = {}
            for part in by_length([len(example.ids) for example in examples], 16):
                rows = response_log_probs(model.eval(), [examples[index] for index in part])
                scores.update(zip(part, (row.mean().item() for row in rows), strict=True))
            solved, likelihood, first = [], [], 0
            for pairs, right in items:
                values = [scores[index] for index in range(first, first + len(pairs))]
                likelihood.append(round(values[right], 5))
                solved.append(max(values) == values[right] if len(pairs) > 1 else is_greedy(model, examples[first]))
                first += len(pairs)
            found[name] = {"correct": list(map(int, solved)), "log_likelihood": likelihood}
        return found


def trained(
    adapted: Any, rows: list[Any], rate: float, seed: int, chosen: dict[str, Any], loss: Any
) -> Iterator[dict[str, Any]]:
    """Train an adapter on rows in random order; yield after each step its number, and all seconds and tokens so far."""
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, chosen.get("last_rate", 1.0), max(chosen["steps"]))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    size, seconds, tokens = chosen["batch_size"], 0.0, 0
    for step in range(1, max(chosen["steps"]) + 1):
        batch = [rows[order[i % len(order)]] for i in range((step - 1) * size, step * size)]
        begun = time.perf_counter()
        adapted.train()
        optimizer.zero_grad(set_to_none=True)
        loss(adapted, batch).backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        decay.step()
        seconds, tokens = seconds + time.perf_counter() - begun, tokens + sum(len(row.ids) for row in batch)
        yield {"step": step, "seconds": seconds, "tokens": tokens}


def is_greedy(model: Any, example: Any) -> bool:
    """Return whether the scored tokens are the model's greedy continuation."""
    ids = torch.tensor([example.ids], device=model.device)
    count = len(example.scored)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=count + 1).logits[0, :-1]
    return bool((logits.argmax(-1) == ids[0, -count:]).all())


class Loss:
    """The loss of a step: answers' tokens, weighted by the method's rule; replayed rows; a KL penalty."""

    def __init__(self, method: dict[str, Any], sampled: list[Tensor], seed: int):
        self.rule, self.replay, self.kl = (method.get(key) for key in ("token_weight", "replay", "kl"))
        self.sampled = sampled
        self.random = torch.Generator().manual_seed(seed + 1)

    def __call__(self, model: Any, batch: list[Any]) -> Tensor:
        """Return the loss, with gradients to the adapter."""
        if self.rule:
            total = weighted_loss(model, batch, self.rule)
        else:
            total = -torch.cat(response_log_probs(model, batch)).mean()
        if self.replay:
            ids = self._ids(model, 2 * KL_TOKENS)
            total = (1 - self.replay) * total + self.replay * model(input_ids=ids, labels=ids).loss
        if self.kl:
            total = total + self.kl * kl_to_base(model, self._ids(model, KL_TOKENS))
        return total

    def _ids(self, model: Any, tokens: int) -> Tensor:
        """Return a window of a sampled row, drawn anew in each step."""
        row = self.sampled[int(torch.randint(len(self.sampled), (1,), generator=self.random))]
        return torch.as_tensor(row)[None, :tokens].to(model.device)


def weighted_loss(model: Any, batch: list[Any], rule: str) -> Tensor:
    """Return the answers' loss with a weight a token: by the recipe option `train.token_weight`."""
    from hiplora.training.losses import token_weights

    ids, mask, positions = (tensor.to(model.device) for tensor in pad_left([example.ids for example in batch]))
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, :-1]
    learned = torch.zeros_like(mask, dtype=torch.bool)
    for row, example in enumerate(batch):
        learned[row, [ids.shape[1] - len(example.ids) + place for place in example.scored]] = True
    picked, targets = logits[learned[:, 1:]].float(), ids[learned]
    losses = torch.nn.functional.cross_entropy(picked, targets, reduction="none")
    return (token_weights(picked.detach(), targets, rule) * losses).mean()


def kl_to_base(model: Any, ids: Tensor) -> Tensor:
    """Return the mean KL(base ‖ adapted) a token."""
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    for parameter, flag in trainable.items():  # PEFT decides anew what is trainable
        parameter.requires_grad_(flag)
    adapted = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    return torch.nn.functional.kl_div(adapted, base, reduction="sum", log_target=True) / len(base)


@contextlib.contextmanager
def scaled(model: Any, scale: float) -> Iterator[None]:
    """Scale an adapter's update for a time: its outer factors, and HiP-LoRA's gains."""
    with torch.no_grad():
        kept = {
            parameter: parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if "lora_B" in name or "delta" in name
        }
        for parameter in kept:
            parameter.mul_(scale)
        yield
        for parameter, value in kept.items():
            parameter.copy_(value)


def once(out: Path, name: str, make: Callable[[], dict[str, Any]]) -> None:
    """Write a result to its file and print its figures, unless it is done or another process is at it."""
    path = out / f"{name}.json"
    with contextlib.suppress(filelock.Timeout), file_lock(out / f".{name}.lock", timeout=0):
        if not path.exists():
            result = {**make(), "provenance": provenance()}
            write_atomic(path, json.dumps(result) + "\n")
            print(summary(name, result), flush=True)


def work(bench: Bench, planned: list[Run]) -> None:
    """Do what is not done and not being done by another process."""
    for run in planned:
        once(bench.out, run.name, lambda run=run: bench.run(run))
    measured = [run for run in planned if run.abilities]
    if measured:
        once(bench.out, "base-abilities", bench.abilities_of_base)
    for run in measured:
        once(bench.out, f"{run.name}-abilities", lambda run=run: bench.abilities_of(run))


def summary(name: str, result: dict[str, Any]) -> str:
    """Return a run's last unscaled figures in a line."""
    last = [point for point in result.get("points", [result]) if point.get("scale", 1) == 1][-1]
    told = [f"loss {last['heldout_loss']:.3f}"] if "heldout_loss" in last else []
    told += [f"edits {sum(last['success'])}/{len(last['success'])}"] if "success" in last else []
    told += ["KL " + ", ".join(f"{text} {kl:.4f}" for text, kl in last["kl"].items())] if "kl" in last else []
    return f"{name}: {'; '.join(told) or 'done'}"


def plan(out: Path, planned: list[Run]) -> None:
    """Print what is done and, by the runs that are done, how long the rest takes."""
    paths = [out / f"{run.name}.json" for run in planned]
    done = [json.loads(path.read_text()) for path in paths if path.exists()]
    print(f"{len(done)} of {len(planned)} runs are done")
    if done:
        mean = sum(result["training_seconds"] for result in done) / len(done)
        print(f"training takes {mean:.0f} s a run, {(len(planned) - len(done)) * mean / 3600:.1f} hours for the rest")


def main() -> None:
    """Do, plan or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("plan", "run", "spread", "report"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--to", type=Path)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--block", nargs="+")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.command == "report":
        from benchmarks.frontier_report import report

        report(args.out, args.to or args.out)
        return
    recipe = yaml.safe_load(args.recipe.read_text(encoding="utf-8"))
    planned = runs(recipe, args.block)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.command == "plan":
        plan(args.out, planned)
        return
    bench = Bench(recipe, args.model, args.data, args.out, args.device)
    if args.command == "run":
        work(bench, planned)
        return
    args.to.mkdir(parents=True, exist_ok=True)
    bench.reference = bench.build(drift_texts(args.data, SPREAD["documents"]), window=SPREAD["window"])
    for run in planned:
        if bench.adapter(run).exists():
            once(args.to, run.name, lambda run=run: bench.spread_of(run))


if __name__ == "__main__":
    main()
