"""`hiplora compare`: LoRA and HiP-LoRA on one's own data with one budget: what each learned and what it disturbed."""

import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from hiplora import __version__
from hiplora.errors import ConfigError, first_line, first_problem
from hiplora.files import write_atomic
from hiplora.provenance import file_sha256, folder_identity, json_sha256, provenance

if TYPE_CHECKING:
    import pandas as pd

    from hiplora.data.examples import Example
    from hiplora.training.recipe import TrainRecipe

HELDOUT_LIMIT = 256  # held-out rows at most: enough for a mean, cheap to measure
DRIFT_TOKENS = 2048  # of each text
ANSWERS, ANSWER_TOKENS = 5, 64
ONE_RUN = "One run of each method with one seed: small differences may be chance."

Results = dict[str, Any]


@dataclass(frozen=True)
class CompareSettings:
    """How long to train, and on what to measure. All methods get the same steps, rate and rows in the same order."""

    steps: int = 200
    lr: float = 2e-4
    batch_size: int = 8
    max_length: int = 512
    rank: int = 16
    principal_rank: int = 32
    drift_text: str | None = None
    heldout_fraction: float = 0.1
    seed: int = 42


def compare(
    model: str,
    data: str | os.PathLike,
    out: str | os.PathLike,
    settings: CompareSettings | None = None,
    *,
    overwrite: bool = False,
) -> Results:
    """Train each method on the rows of `data`, measure it, and write `results.json`, `report.html` and the adapters.

    An unfinished comparison of the same settings in `out` goes on where it stopped.

    Raises:
        ConfigError, DataError: settings, model, data or output folder cannot be used; found before a model loads.
        HipLoraError: training failed.
    """
    from hiplora.data.examples import load_data
    from hiplora.data.texts import drift_texts
    from hiplora.run_folder import RunFolder

    settings = settings or CompareSettings()
    targets = check_model(model, settings.principal_rank)
    recipes = _recipes(model, data, settings, targets)
    texts, rows = drift_texts(settings.drift_text), load_data(next(iter(recipes.values())).data)
    plan = {
        "kind": "compare",
        "hiplora": __version__,
        "settings": {name: value for name, value in asdict(settings).items() if name != "drift_text"},
        "data_sha256": file_sha256(data),
        "drift_texts_sha256": json_sha256(texts),
        "model_sha256": folder_identity(model),
    }
    folder = RunFolder(Path(out), "plan.json", "results.json")
    folder.check(plan, overwrite=overwrite)
    with folder.claimed(plan, overwrite=overwrite):
        adapters = folder.path / "adapters"
        base = functools.cache(lambda: Base(model, texts, DRIFT_TOKENS))

        def answers(network: Any) -> Results:
            return _answers(network, base().tokenizer, rows.held_out)

        def measured(adapter: Path) -> Results:
            return base().measure(adapter, answers)

        trained, written = {}, {}
        for name, recipe in recipes.items():
            train = functools.partial(_train, recipe, name, adapters / slug(name))
            trained[name] = folder.stage(f"train-{slug(name)}", train)
        written["base"] = folder.stage("measure-base", lambda: answers(base().model))["answers"]
        for name, record in trained.items():
            found = folder.stage(f"measure-{slug(name)}", functools.partial(measured, adapters / slug(name)))
            written[name], record["drift"] = found["answers"], found["drift"]
        results = {
            "schema": 2,
            "kind": "compare",
            "title": f"LoRA and HiP-LoRA on {Path(data).name}",
            "model": model,
            "data": {**rows.sources["train"], "held_out_rows": len(rows.held_out)},
            "settings": asdict(settings),
            "base": {"held_out_loss": next(iter(trained.values()))["held_out"]["before"]},
            "methods": trained,
            "answers": [
                {
                    "prompt": row.prompt,
                    "expected": row.response,
                    **{name: texts[place] for name, texts in written.items()},
                }
                for place, row in enumerate(_asked(rows.held_out))
            ],
            "notes": [*_overlaps(texts, rows.train), ONE_RUN],
            "provenance": provenance(plan_sha256=json_sha256(plan)),
        }
        _write_report(results, folder.path / "report.html")
        write_atomic(folder.path / "results.json", json.dumps(results, indent=1) + "\n")
    return results


def summary(results: Results) -> "pd.DataFrame":
    """Return the results as a table, a row a method and the base model first."""
    import pandas as pd

    rows = [{"method": "base", "held-out loss": results["base"]["held_out_loss"]}]
    for name, record in results["methods"].items():
        drift = record["drift"]
        rows.append(
            {
                "method": name,
                "held-out loss": record["held_out"]["after"],
                **{f"KL, {text}": found["kl"] for text, found in drift.items()},
                **{f"perplexity ratio, {text}": found["perplexity_ratio"] for text, found in drift.items()},
                "trainable parameters": f"{record['trainable_parameters']:,}",
                "seconds": round(record["seconds"], 1),
            }
        )
    return pd.DataFrame(rows)


def method_settings(rank: int, principal_rank: int, targets: Mapping[str, Sequence[str]], **shared: Any) -> Results:
    """Return the compared methods, by display name, as the `method` block of a recipe.

    `targets` are the modules that each preset of HiP-LoRA adapts (see `check_model`). All have the same rank, so those
    on the same modules have as many trainable parameters, but for the paper's gains.
    """
    lora = {"name": "lora", "r": rank, "lora_alpha": 2 * rank, **shared}
    hiplora = {**lora, "name": "hiplora", "principal_rank": principal_rank}
    attention, mlps = list(targets["paper"]), list(targets["function-aware"])
    return {
        "LoRA": {**lora, "target_modules": attention},
        "LoRA on the MLPs": {**lora, "target_modules": mlps},
        "HiP-LoRA": {**hiplora, "preset": "function-aware", "target_modules": mlps},
        "HiP-LoRA (paper)": {**hiplora, "preset": "paper", "target_modules": attention},
    }


def check_model(model: str, principal_rank: int) -> dict[str, list[str]]:
    """Return the modules that each preset of HiP-LoRA adapts, read off the model's configuration without its weights.

    Raises:
        ConfigError: the model cannot be found, has no such modules, or some with at most `principal_rank` directions.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from hiplora.models import quiet_transformers, resolve
    from hiplora.training.recipe import model_problem
    from hiplora.tuner import PRESETS, HipLoraConfig, default_targets, find_targets

    if problem := model_problem(model):
        raise ConfigError(problem)
    try:
        with quiet_transformers(), torch.device("meta"):
            config = AutoConfig.from_pretrained(resolve(model), trust_remote_code=False)
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {model}: its configuration cannot be read ({first_line(error)})") from error
    targets = {preset: default_targets(skeleton, preset) for preset in PRESETS}
    for names in targets.values():
        for found in find_targets(skeleton, HipLoraConfig(target_modules=names)):
            if min(found.shape) <= principal_rank:
                raise ConfigError(
                    f"--principal-rank is {principal_rank}, but layer {found.name} has only min(out, in) = "
                    f"{min(found.shape)} directions, which leaves none for the residual channel; lower it"
                )
    return targets


def slug(name: str) -> str:
    """Return a name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _recipes(
    model: str, data: str | os.PathLike, settings: CompareSettings, targets: Mapping[str, Sequence[str]]
) -> "dict[str, TrainRecipe]":
    from hiplora.training.recipe import TrainRecipe

    shared = {
        "model": model,
        "data": {
            "path": str(data),
            "held_out_fraction": settings.heldout_fraction,
            "held_out_limit": HELDOUT_LIMIT,
        },
        "train": {
            "steps": settings.steps,
            "lr": settings.lr,
            "batch_size": settings.batch_size,
            "gradient_accumulation": 1,
            "max_length": settings.max_length,
            "packing": False,
        },
        "seed": settings.seed,
    }
    methods = method_settings(settings.rank, settings.principal_rank, targets)
    try:
        return {name: TrainRecipe.model_validate({**shared, "method": method}) for name, method in methods.items()}
    except ValidationError as error:
        raise ConfigError(f"setting {first_problem(error)}") from None


def _train(recipe: "TrainRecipe", name: str, out: Path) -> Results:
    from hiplora.training import train

    result = train(recipe, out, resume=True, description=name)
    return {
        "trainable_parameters": result.trainable_parameters,
        "seconds": result.seconds,
        "tokens": result.tokens,
        "held_out": result.held_out,
    }


class Base:
    """The base model, loaded once and bare between measurements, with its predictions on the drift texts."""

    def __init__(self, model: str, texts: Mapping[str, str], tokens: int):
        from hiplora.evaluation import BaseReference
        from hiplora.models import load

        self.model, self.tokenizer = load(model)
        self.reference = BaseReference.build(self.model, self.tokenizer, texts, max_tokens=tokens)

    def measure(self, adapter: Path, also: Callable[[Any], Results]) -> Results:
        """Return an adapter's drift, and what `also` measures on the model with the adapter."""
        from hiplora.evaluation import measure_drift
        from hiplora.evaluation.mounting import mounted

        with mounted(self.model, adapter) as adapted:
            drift = measure_drift(adapted, self.reference)
            return {"drift": {text: found.as_dict() for text, found in drift.items()}, **also(adapted)}


def _answers(model: Any, tokenizer: Any, held_out: "Sequence[Example]") -> Results:
    from hiplora.evaluation.answers import continuations

    prompts = [_prompt(tokenizer, example) for example in _asked(held_out)]
    return {"answers": continuations(model, tokenizer, prompts, ANSWER_TOKENS)}


def _asked(held_out: "Sequence[Example]") -> "list[Example]":
    return [example for example in held_out if example.prompt][:ANSWERS]


def _prompt(tokenizer: Any, example: "Example") -> str:
    if not example.messages:
        return example.prompt
    before = [dict(message) for message in example.messages[:-1]]
    return tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)


def _overlaps(texts: Mapping[str, str], train: "Sequence[Example]") -> list[str]:
    from hiplora.data.texts import overlap

    shares = overlap(texts, [example.prompt + example.response for example in train])
    return [
        f"{share:.0%} of the drift text “{name}” stands in the training data too: its drift says little."
        for name, share in shares.items()
        if share
    ]


def _write_report(results: Results, path: Path) -> None:
    import pandas as pd

    from hiplora.reporting import Section, plots, save_page

    drift = pd.DataFrame(
        [
            {"method": name, "text": text, "kl": found["kl"]}
            for name, record in results["methods"].items()
            for text, found in record["drift"].items()
        ]
    )
    text = (
        "Every method trained on the same rows in the same order. Held-out loss, in nats per learned token, is on rows "
        "that were kept back. Drift is on other text: KL divergence from the base model in nats per token, and "
        "perplexity against the base model's.\n\n" + "\n\n".join(results["notes"])
    )
    bars = plots.bars(drift, "kl", "text", "method", xlabel="KL")
    figures = {"Drift from the base model, nats per token": bars}
    answers = {
        row["prompt"]: pd.DataFrame([{"model": k, "answer": v} for k, v in row.items() if k != "prompt"])
        for row in results["answers"]
    }
    sections = [
        Section("What each method learned and what it disturbed", text, {"Methods": summary(results)}, figures),
        Section("Answers to held-out prompts", tables=answers),
    ]
    about = {"model": results["model"], "data": results["data"], "settings": results["settings"]}
    save_page(path, results["title"], sections, f"Base model {results['model']}", {**about, **results["provenance"]})
