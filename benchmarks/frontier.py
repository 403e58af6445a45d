"""The long frontier: learning against drift, over methods, rates, seeds, steps and scales of the finished adapter.

    python -m benchmarks.frontier plan   --data FOLDER --out FOLDER
    python -m benchmarks.frontier run    --data FOLDER --out FOLDER [--block main ...] [--model MODEL] [--device auto]
    python -m benchmarks.frontier report --out FOLDER --to FOLDER

`run` is one bare training loop on torch, transformers and PEFT, so that it runs on any machine, with or without a GPU.
A run is one JSON file, written when it is done: a series goes on where it stopped, and several processes share it.
`report` turns the files into one tidy table (`records.csv`: run, task, method, rate, seed, step, scale, metric, value),
the comparison at equal learning and its figure. `--data` holds the JSON lines that the functions below name.

Learning is the held-out loss (nats a token of the answers). Drift is KL(base ‖ adapted) a token on three texts that
no run trains or calibrates on, and on the task's own prompts. Abilities are items of five benchmarks, base and adapted
paired by item: the right choice preferred, and its log-likelihood.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

RECIPE = Path(__file__).with_suffix(".yaml")
Pair = tuple[str, str]
CLIP, KL_TOKENS = 1.0, 128


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
            abilities = block.get("abilities", False)
            axes = itertools.product(block["seeds"], block["tasks"], block["rates"], block["methods"])
            for seed, task, rate, method in axes:
                run = Run(task, method, float(rate), seed, abilities)
                found.setdefault(run.name, run)
    return list(found.values())


# Data: rows to train on, texts to measure on, items of abilities


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines, gzipped or not."""
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    return [json.loads(line) for line in text.split("\n") if line]


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


def drift_texts(data: Path) -> dict[str, str]:
    """Return the texts that no run trains or calibrates on."""
    code = read_rows(data / "humaneval.jsonl")
    return {
        "wikitext": "".join(row["text"] for row in read_rows(data / "wikitext2_raw_valid.jsonl.gz")),
        "python": "\n".join(row["prompt"] + row["canonical_solution"] for row in code),
        "german": "\n".join(row["de"] for row in read_rows(data / "flores_dev.jsonl.gz")),
    }


def ability_items(data: Path, count: int) -> dict[str, list[tuple[list[Pair], int]]]:
    """Return per benchmark its first items: (prompt, answer) of every choice, and the right one's index."""

    def choices(prompt: str, row: dict[str, Any]) -> tuple[list[Pair], int]:
        return [(prompt, f" {choice}") for choice in row["choices"]], row["answer"]

    def rows(name: str) -> list[dict[str, Any]]:
        return read_rows(data / f"{name}.jsonl.gz")[:count]

    return {
        "hellaswag": [choices(row["context"], row) for row in rows("hellaswag")],
        "piqa": [choices(f"Question: {row['question']}\nAnswer:", row) for row in rows("piqa")],
        "arc_easy": [choices(f"Question: {row['question']}\nAnswer:", row) for row in rows("arc_easy")],
        "boolq": [choices(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", row) for row in rows("boolq")],
        "lambada": [([(row["context"], f" {row['answer']}")], 0) for row in rows("lambada")],
    }


# One run

_OF_THE_LOOP = ("kl", "replay", "token_weight")


def make_config(model: Any, method: dict[str, Any]) -> Any:
    """Return the PEFT configuration of a method of the recipe; every low-rank update is scaled by 2."""
    import peft

    from hiplora import HipLoraConfig
    from hiplora.tuner import default_targets

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
        from hiplora.evaluation import BaseReference
        from hiplora.models import load

        self.recipe, self.chosen, self.data, self.out = recipe, recipe["measure"], data, out
        self.model, self.tokenizer = load(model)
        self.model.to(device)
        self.name = model
        self.texts = drift_texts(data)
        self.build = lambda texts, tokens: BaseReference.build(self.model, self.tokenizer, texts, max_tokens=tokens)
        self.reference = self.build(self.texts, self.chosen["drift_tokens"])
        self.items = ability_items(data, self.chosen["items"])
        self.replayed: list[Tensor] | None = None

    def examples(self, task: str) -> tuple[list[Any], list[Any]]:
        """Return the tokenized rows to train on and to hold out, none longer than the recipe's `max_tokens`."""
        from hiplora.evaluation import encode

        train, held = task_pairs(task, self.data)
        kept = []
        for pairs, count in ((train, 4 * max(self.chosen["steps"])), (held, self.chosen["heldout_rows"])):
            encoded = (encode(self.tokenizer, prompt, answer + self.tokenizer.eos_token) for prompt, answer in pairs)
            short = (example for example in encoded if len(example.ids) <= self.chosen["max_tokens"])
            kept.append(list(itertools.islice(short, count)))
        return kept[0], kept[1]

    def sampled(self) -> list[Tensor]:
        """Return rows that the bare model wrote, for replay and the KL penalty; sampled once."""
        from hiplora.tuner import sampled_rows

        if self.replayed is None:
            self.replayed = list(sampled_rows(self.model, 10_000))
        return self.replayed

    def adapt(self, run: Run) -> Any:
        """Put a fresh adapter on the model."""
        import peft

        config = make_config(self.model, self.recipe["methods"][run.method])
        torch.manual_seed(run.seed)
        return peft.get_peft_model(self.model, config)

    def run(self, run: Run) -> dict[str, Any]:
        """Train and measure; the model is bare again afterwards."""
        method, (train, held) = self.recipe["methods"][run.method], self.examples(run.task)
        sampled = self.sampled() if "kl" in method or "replay" in method else []
        prompts = "\n\n".join(prompt for prompt, _ in task_pairs(run.task, self.data)[1][:40])
        own = self.build({"task": prompts}, self.chosen["drift_tokens"] // 2)
        started = time.perf_counter()
        adapted = self.adapt(run)
        prepared = time.perf_counter() - started
        parameters = [p for p in adapted.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=run.rate, weight_decay=0.0)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(run.seed)).tolist()
        loss = Loss(method, sampled, run.seed)
        size, points, seconds = self.chosen["batch_size"], [], 0.0
        try:
            for step in range(1, max(self.chosen["steps"]) + 1):
                batch = [train[order[i % len(order)]] for i in range((step - 1) * size, step * size)]
                begun = time.perf_counter()
                adapted.train()
                optimizer.zero_grad(set_to_none=True)
                loss(adapted, batch, step).backward()
                torch.nn.utils.clip_grad_norm_(parameters, CLIP)
                optimizer.step()
                seconds += time.perf_counter() - begun
                if step in self.chosen["steps"]:
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
            "trainable_parameters": sum(p.numel() for p in parameters),
            "preparation_seconds": prepared,
            "training_seconds": seconds,
            "points": points,
        }

    def adapter(self, run: Run) -> Path:
        """Return the folder of a finished run's adapter."""
        return self.out / "adapters" / run.name

    def abilities_of(self, run: Run) -> dict[str, Any]:
        """Measure the abilities of a finished run's adapter; the model is bare again afterwards."""
        import peft

        adapted = peft.PeftModel.from_pretrained(self.model, str(self.adapter(run)))
        try:
            return {**run._asdict(), "abilities": self.measure_abilities(adapted)}
        finally:
            self.model = adapted.unload()

    def measure(self, adapted: Any, held: list[Any], own: Any) -> dict[str, Any]:
        """Return the held-out loss, the drift on every text, and the share of greedy tokens that changed."""
        from hiplora.evaluation import heldout_loss, measure_drift

        drift = {**measure_drift(adapted.eval(), self.reference), **measure_drift(adapted, own)}
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
        from hiplora.evaluation import encode, response_log_probs
        from hiplora.evaluation.likelihood import by_length

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

    def __call__(self, model: Any, batch: list[Any], step: int) -> Tensor:
        """Return the loss, with gradients to the adapter."""
        from hiplora.evaluation import response_log_probs

        if self.rule:
            total = weighted_loss(model, batch, self.rule)
        else:
            total = -torch.cat(response_log_probs(model, batch)).mean()
        if self.replay:
            total = (1 - self.replay) * total + self.replay * model(
                **self._text(model, 2 * KL_TOKENS, labels=True)
            ).loss
        if self.kl:
            total = total + self.kl * kl_to_base(model, self._text(model, KL_TOKENS))
        return total

    def _text(self, model: Any, tokens: int, labels: bool = False) -> dict[str, Tensor]:
        """Return a window of a sampled row, drawn anew in each step."""
        row = self.sampled[int(torch.randint(len(self.sampled), (1,), generator=self.random))]
        ids = torch.as_tensor(row)[None, :tokens].to(model.device)
        return {"input_ids": ids, "labels": ids} if labels else {"input_ids": ids}


def weighted_loss(model: Any, batch: list[Any], rule: str) -> Tensor:
    """Return the answers' loss with a weight a token: by the recipe option `train.token_weight`."""
    from hiplora.evaluation.likelihood import pad_left
    from hiplora.training.losses import token_weights

    ids, mask, positions = (tensor.to(model.device) for tensor in pad_left([example.ids for example in batch]))
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, :-1]
    learned = torch.zeros_like(mask, dtype=torch.bool)
    for row, example in enumerate(batch):
        learned[row, [ids.shape[1] - len(example.ids) + place for place in example.scored]] = True
    picked, targets = logits[learned[:, 1:]].float(), ids[learned]
    losses = torch.nn.functional.cross_entropy(picked, targets, reduction="none")
    return (token_weights(picked.detach(), targets, rule) * losses).mean()


def kl_to_base(model: Any, text: dict[str, Tensor]) -> Tensor:
    """Return the mean KL(base ‖ adapted) a token."""
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with torch.no_grad(), model.disable_adapter():
        base = model(**text, use_cache=False).logits[0].float().log_softmax(-1)
    for parameter, flag in trainable.items():  # PEFT decides anew what is trainable
        parameter.requires_grad_(flag)
    adapted = model(**text, use_cache=False).logits[0].float().log_softmax(-1)
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


def work(bench: Bench, planned: list[Run]) -> None:
    """Do what is not done and not being done by another process."""
    import filelock

    from hiplora.files import write_atomic

    def once(name: str, make: Any) -> None:
        path = bench.out / f"{name}.json"
        with contextlib.suppress(filelock.Timeout), filelock.FileLock(bench.out / f".{name}.lock", timeout=0):
            if not path.exists():
                result = make()
                write_atomic(path, json.dumps(result) + "\n")
                print(summary(name, result), flush=True)

    for run in planned:
        once(run.name, lambda run=run: bench.run(run))
    if any(run.abilities for run in planned):
        once("base-abilities", lambda: {"model": bench.name, "abilities": bench.measure_abilities(bench.model)})
    for run in planned:
        if run.abilities:
            once(f"{run.name}-abilities", lambda run=run: bench.abilities_of(run))


def summary(name: str, result: dict[str, Any]) -> str:
    """Return a run's last unscaled figures in a line."""
    if "points" not in result:
        return name
    last = [point for point in result["points"] if point["scale"] == 1][-1]
    drift = ", ".join(f"{text} {kl:.4f}" for text, kl in last["kl"].items())
    return f"{name}: loss {last['heldout_loss']:.3f}; KL {drift}; {result['training_seconds']:.0f} s of training"


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
    parser.add_argument("command", choices=("plan", "run", "report"))
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
    else:
        work(Bench(recipe, args.model, args.data, args.out, args.device), planned)


if __name__ == "__main__":
    main()
