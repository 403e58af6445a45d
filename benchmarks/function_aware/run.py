"""Frontiers of learning against drift: train each variant of the recipe on each job, and measure it at several steps.

    python -m benchmarks.function_aware.run --data FOLDER --out FOLDER [--series NAME ...] [--threads 1]

A run is measured by the mean negative log-likelihood of held-out answers (nats per token) or the edits that work, and
by the KL divergence from the base model on WikiText, Python code and German sentences. One JSON file a run, written
aside and renamed: a series goes on where it stopped, and several processes share it. `--data` holds the gzipped JSON
lines that `data.py` names."""

import argparse
import itertools
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import yaml
from benchmarks.frontier import Loss, once, trained
from benchmarks.function_aware.data import calibration_text, drift_texts, edit_sets, job_rows

import hiplora
from hiplora import HipLoraConfig
from hiplora.adapters import save_as_lora
from hiplora.editing import EditTraining, evaluate_edits, train_edits
from hiplora.evaluation import BaseReference, heldout_loss, measure_drift
from hiplora.evaluation.mounting import mounted
from hiplora.files import staged_dir
from hiplora.merging import merge
from hiplora.models import load
from hiplora.training.method import save_adapter
from hiplora.tuner.layer import HipLoraLinear

HERE = Path(__file__).parent
RECIPE = HERE.parents[1] / "docs" / "results" / "function-aware" / "recipe.yaml"


class Job(NamedTuple):
    """One run: what is trained, how, and from which seed."""

    task: str
    variant: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.variant}-lr{self.lr:g}-seed{self.seed}"


def jobs(recipe: dict[str, Any], chosen: list[str] | None) -> Iterator[Job]:
    """Yield the runs of the recipe's series, in order."""
    for series in recipe["series"]:
        if chosen and series["name"] not in chosen:
            continue
        for parts in itertools.product(series["seeds"], series["jobs"], series["lrs"], series["variants"]):
            seed, task, lr, variant = parts
            yield Job(task, variant, float(lr), seed)


def make_config(recipe: dict[str, Any], variant: str) -> tuple[Any, dict[str, Any]]:
    """Return the PEFT configuration of a variant and what it is calibrated on; every one scales its update by 2."""
    settings = dict(recipe["variants"][variant])
    calibration = settings.pop("calibration", {})
    settings["target_modules"] = recipe["targets"][settings["target_modules"]]
    shared = {"lora_alpha": 2 * settings["r"], "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
    if settings.pop("method", None) == "lora":
        return peft.LoraConfig(**shared, **settings), {}
    return HipLoraConfig(**{"preset": "paper", "principal_rank": 32, **shared, **settings}), calibration


class Bench:
    """The base model with what every run needs, loaded once."""

    def __init__(self, recipe: dict[str, Any], data: Path, out: Path):
        self.recipe, self.data, self.out = recipe, data, out
        self.model, self.tokenizer = load(recipe["model"])
        tokens = recipe["measure"]["drift_tokens"]
        self.reference = BaseReference.build(self.model, self.tokenizer, drift_texts(data), max_tokens=tokens)

    def adapt(self, job: Job) -> Any:
        """Put a fresh adapter on the model."""
        config, calibration = make_config(self.recipe, job.variant)
        if getattr(config, "basis", "") == "activation":
            tokens = calibration.get("tokens", 10_000)
            rows = None
            if source := calibration.get("text"):
                text = calibration_text(source, self.data)[: 8 * tokens]
                ids = self.tokenizer(text, verbose=False)["input_ids"][:tokens]
                rows = [ids[first : first + 256] for first in range(0, len(ids), 256)]
            hiplora.calibrate(self.model, config, rows=rows, source=source or "", tokens=tokens)
        torch.manual_seed(job.seed)
        return peft.get_peft_model(self.model, config)

    def measure_drift(self, adapted: Any) -> dict[str, Any]:
        drift = measure_drift(adapted, self.reference)
        return {
            "kl": {name: text.kl for name, text in drift.items()},
            "perplexity_ratio": {name: text.perplexity_ratio for name, text in drift.items()},
        }

    def run(self, job: Job) -> dict[str, Any]:
        """Train and measure; the model is bare again afterwards."""
        start = time.perf_counter()
        adapted = self.adapt(job)
        prepared = time.perf_counter() - start
        try:
            work = self._edits if job.task.startswith("edits") else self._frontier
            result = work(adapted, job)
            trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        finally:
            self.model = adapted.unload()
        return {
            **job._asdict(),
            "settings": self.recipe["variants"][job.variant],
            "trainable_parameters": trainable,
            "preparation_seconds": prepared,
            **result,
        }

    def _frontier(self, adapted: Any, job: Job) -> dict[str, Any]:
        chosen, points = self.recipe["measure"], []
        train, held = job_rows(job.task, self.data, self.tokenizer, chosen)
        with adapted.disable_adapter():
            before = heldout_loss(adapted, held)
        for done in trained(adapted, train, job.lr, job.seed, chosen, Loss({}, [], job.seed)):
            if done["step"] in chosen["steps"]:
                loss = heldout_loss(adapted.eval(), held)
                found = {**self.measure_drift(adapted), "gains": gains(adapted)}
                points.append({"step": done["step"], "heldout_loss": loss, **found})
        return {"heldout_loss_before": before, "points": points} | {key: done[key] for key in ("seconds", "tokens")}

    def _edits(self, adapted: Any, job: Job) -> dict[str, Any]:
        """Train one set of edits ("edits1" is the first) and keep the adapter at the end, for the merges."""
        part = self._edit_sets()[int(job.task.removeprefix("edits")) - 1]
        points: list[dict[str, Any]] = []

        def on_step(step: int) -> None:
            if step in self.recipe["edits"]["steps"]:
                points.append({"step": step, **self.measure_edits(adapted, [part])})
                adapted.train()

        steps = max(self.recipe["edits"]["steps"])
        training = EditTraining(steps, job.lr, batch_size=len(part[0]), weight_decay=0.0, seed=job.seed)
        result = train_edits(adapted, self.tokenizer, part[0], training, on_step)
        with staged_dir(self.adapter(job), overwrite=True) as staged:
            save_adapter(adapted, staged)
        return {"points": points, "tokens": result["tokens"]}

    def _edit_sets(self) -> Any:
        return edit_sets(self.data, *(self.recipe["edits"][key] for key in ("sets", "per_set", "neighbours")))

    def measure_base(self) -> dict[str, Any]:
        """Ask the bare base model all edits and their neighbours: what there is to lose, and what is there already."""
        return {"task": "base", "seed": 0, **self.measure_answers(self.model, self._edit_sets())}

    def measure_edits(self, adapted: Any, sets: Any) -> dict[str, Any]:
        """Measure answers and drift."""
        return {**self.measure_answers(adapted, sets), **self.measure_drift(adapted)}

    def measure_answers(self, adapted: Any, sets: Any) -> dict[str, Any]:
        """Say which edits work, on their prompt and its paraphrase, and which neighbours kept their answer."""
        edits, near = ([edit for part in parts for edit in part] for parts in zip(*sets, strict=True))
        asked = evaluate_edits(adapted, self.tokenizer, edits)
        again = evaluate_edits(adapted, self.tokenizer, edits, paraphrase=True)
        kept = evaluate_edits(adapted, self.tokenizer, near)
        return {
            "success": (asked["preferred"] == 1).tolist(),
            "paraphrase": (again["preferred"] == 1).tolist(),
            "neighbours_kept": (kept["preferred"] == 0).tolist(),
        }

    def adapter(self, job: Job) -> Path:
        return self.out / "adapters" / job.name

    def merge(self, job: Job, count: int) -> dict[str, Any]:
        """Add the adapters of the first `count` edit sets, and measure the sum on all their edits."""
        parts = [self.adapter(job._replace(task=f"edits{index + 1}")) for index in range(count)]
        folder = self.out / "adapters" / f"merged{count}-{job.name}"
        save_as_lora(merge(parts, "addition"), folder, overwrite=True, check_logits=False)
        with mounted(self.model, folder) as adapted:
            point = self.measure_edits(adapted, self._edit_sets()[:count])
        shutil.rmtree(folder)
        return {**job._asdict(), "task": f"merge{count}", "settings": self.recipe["variants"][job.variant], **point}


def gains(adapted: Any) -> dict[str, float] | None:
    """Return the largest gain and the largest relative gain of all layers, None without a principal channel."""
    layers = [m for m in adapted.modules() if isinstance(m, HipLoraLinear) and m.hiplora_delta]
    if not layers:
        return None
    pairs = [(m.hiplora_delta["default"].detach().abs(), m.hiplora_sigma["default"]) for m in layers]
    return {
        "largest": max(delta.max().item() for delta, _ in pairs),
        "largest_relative": max((delta / sigma.clamp_min(1e-9)).max().item() for delta, sigma in pairs),
    }


def work(bench: Bench, planned: list[Job]) -> None:
    """Do what is not done and not being done by another process."""
    if any(job.task == "edits1" for job in planned):
        once(bench.out, "base", bench.measure_base)
    for job in planned:
        once(bench.out, job.name, lambda job=job: bench.run(job))
    for job, count in itertools.product(planned, bench.recipe["edits"]["merges"]):
        parts = [job._replace(task=f"edits{index + 1}") for index in range(count)]
        if job.task == "edits1" and all((bench.out / f"{part.name}.json").exists() for part in parts):
            once(bench.out, job._replace(task=f"merge{count}").name, lambda j=job, n=count: bench.merge(j, n))


def main() -> None:
    """Do the runs that are not done yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--series", nargs="+")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    recipe = yaml.safe_load(args.recipe.read_text(encoding="utf-8"))
    args.out.mkdir(parents=True, exist_ok=True)
    work(Bench(recipe, args.data, args.out), list(jobs(recipe, args.series)))


if __name__ == "__main__":
    main()
