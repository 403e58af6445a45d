"""`hiplora compare`: what LoRA and HiP-LoRA do to a model on your data, read at equal learning.

Every adapter, at marks along its training and scaled down after it, is one point: what it learned (loss on held-out
rows) and what it disturbed (drift on other text). The methods are compared where all have learned the same.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hiplora.compare_report import SMALL, Results, at_equal_learning, write_report
from hiplora.data.examples import Example
from hiplora.data.rows import decoded
from hiplora.data.texts import drift_texts, overlap
from hiplora.errors import ConfigError, DataError, first_line, first_problem
from hiplora.models import skeleton
from hiplora.run_folder import RunFolder
from hiplora.training import TrainRecipe
from hiplora.training.adapt import fitting_config
from hiplora.training.reading import absolute_paths, model_problem
from hiplora.trainings import HELDOUT_LIMIT, MARKS, Tell, Trainings, prompt_text
from hiplora.tuner import default_targets
from hiplora.tuner.experts import can_unroll

OWN_ROWS = 3  # held-out prompts among the questions
QUESTIONS = (
    "What is the capital of Australia?",
    "Who wrote Romeo and Juliet?",
    "Why is the sky blue?",
    "Write a Python function that reverses a string.",
    "Name three planets.",
    "What is 7 times 8?",
    "Begin a story about a dragon who is afraid of fire.",
    "Give me a tip for sleeping better.",
)


@dataclass(frozen=True)
class Compared:
    """A method as it is recommended; a plain LoRA may get the modules that a `preset` of HiP-LoRA adapts."""

    title: str
    adapts: str
    settings: Mapping[str, Any]
    preset: str | None = None

    def block(self, rank: int, principal_rank: int) -> dict[str, Any]:
        """Return the method's block of a recipe."""
        block = {"r": rank, "lora_alpha": 2 * rank, **self.settings}
        return block | ({"principal_rank": principal_rank} if block["name"] == "hiplora" else {})


METHODS = {
    "lora": Compared("LoRA", "all linear layers", {"name": "lora", "target_modules": "all-linear"}),
    "lora-mlp": Compared("LoRA on the MLPs", "the MLPs", {"name": "lora"}, "function-aware"),
    "lora-attention": Compared("LoRA on the attention", "the attention", {"name": "lora"}, "paper"),
    "hiplora": Compared("HiP-LoRA", "the MLPs", {"name": "hiplora", "preset": "function-aware"}),
    "hiplora-paper": Compared("HiP-LoRA (paper)", "the attention", {"name": "hiplora", "preset": "paper"}),
}


USUAL, OVER_EXPERTS, OF_ONE_KIND = ("lora", "lora-mlp", "hiplora"), ("lora-attention", "hiplora"), ("lora", "hiplora")


@dataclass(frozen=True)
class CompareSettings:
    """How long to train, and on what to measure. All methods get the same rows in one order.

    `methods` None are those of `USUAL`, or over a mixture of experts or a state space model those that fit it.
    """

    methods: tuple[str, ...] | None = None
    steps: int = 40
    lr: float = 1e-3
    batch_size: int = 4
    max_length: int = 512
    rank: int = 16
    principal_rank: int = 32
    prompts: str | None = None
    drift_text: str | None = None
    heldout_fraction: float = 0.15
    seed: int = 42


def compare(
    model: str,
    data: str | os.PathLike,
    out: str | os.PathLike,
    settings: CompareSettings | None = None,
    *,
    overwrite: bool = False,
    tell: Tell = lambda text: None,
) -> Results:
    """Train each method on the rows of `data`, measure it, and write `results.json`, `report.html` and the adapters.

    An unfinished comparison of the same settings in `out` goes on where it stopped. `tell` gets a line that says how
    long it will take. Of several processes under a launcher all but the first return nothing. ConfigError or DataError
    if settings, model, data or `out` cannot be used, before a model loads.
    """
    settings = settings or CompareSettings()
    way_out = "name other --methods, or train from a recipe of your own (hiplora init)"
    recipes = method_recipes(model, data, settings, way_out)
    texts, questions = drift_texts(settings.drift_text), _questions(settings.prompts)
    trainings = Trainings("compare", model, data, recipes, settings)
    tokenizer, limit, rows = trainings.tokenizer, trainings.limit, trainings.rows

    def fits(prompt: Example | str) -> bool:
        return len(tokenizer(prompt_text(tokenizer, prompt))["input_ids"]) < limit

    own_rows = [example for example in rows.held_out if example.prompt and fits(example)][:OWN_ROWS]
    if too_long := next((question for question in questions if not fits(question)), None):
        raise ConfigError(f"--prompts: {too_long[:40]!r} fills the model's context of {limit} tokens; shorten it")
    folder, titles = RunFolder(Path(out), "plan.json", "results.json"), {key: METHODS[key].title for key in recipes}
    if not trainings.leads:
        trainings.follow(folder)
        return {}
    with trainings.measured(folder, titles, texts, questions, overwrite=overwrite, tell=tell) as (shared, runs):
        has_one_kind = _has_one_kind(trainings.network)
        adapts = {key: METHODS["lora" if has_one_kind else key].adapts for key in recipes}
        records = {titles[key]: {"adapts": adapts[key], **record} for key, record in runs.items()}
        adapters = {titles[key]: folder.path / "adapters" / key for key in recipes}
        base = trainings.base
        answers = folder.stage("answers", lambda: {"rows": base().answers(adapters, [*own_rows, *questions])})["rows"]
        prompts = [example.prompt for example in own_rows] + questions
        results = {
            "schema": 3,
            **shared,
            "settings": {**asdict(settings), "methods": list(recipes)},
            "methods": records,
            "equal": at_equal_learning(shared["base"]["held_out_loss"], records),
            "expected": [example.response for example in own_rows],
            "answers": [{"prompt": prompt, "said": row} for prompt, row in zip(prompts, answers, strict=True)],
            "notes": _notes(texts, rows.train),
        }
        write_report(results, folder.path)
    return results


def method_recipes(
    model: str, data: str | os.PathLike, settings: CompareSettings, way_out: str = "take another model"
) -> dict[str, TrainRecipe]:
    """Return each method's recipe, by its key; the model's configuration is read, not its weights.

    ConfigError if a setting or a method is wrong, the model cannot be found, or a method does not fit it; `way_out`
    says what to do about the last.
    """
    unknown = [key for key in settings.methods or () if key not in METHODS]
    if unknown or settings.methods == ():
        raise ConfigError(f"--methods {', '.join(unknown) or 'names none'}: expected some of {', '.join(METHODS)}")
    if problem := model_problem(model):
        raise ConfigError(problem)
    network = skeleton(model)
    if getattr(network.config, "quantization_config", None):
        raise ConfigError(f"model {model}: is quantised, and nothing can be added to its weights; name the whole one")
    has_experts = any(map(can_unroll, network.modules()))
    usual = OVER_EXPERTS if has_experts else OF_ONE_KIND if _has_one_kind(network) else USUAL
    methods = {key: METHODS[key] for key in settings.methods or usual}
    if has_experts and (unfit := methods.keys() & {"lora", "lora-mlp"}):
        why = "PEFT's LoRA adapts a mixture's experts and its router as parameters, not as layers"
        raise ConfigError(f"method {min(unfit)}: {why}, but lora-attention and hiplora fit; {way_out}")
    split = {"held_out_fraction": settings.heldout_fraction, "held_out_limit": HELDOUT_LIMIT, "template": "auto"}
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.batch_size % processes:
        raise ConfigError(
            f"--batch-size {settings.batch_size}: is no multiple of the {processes} processes that share it"
        )
    train = {name: getattr(settings, name) for name in ("steps", "lr", "max_length")}
    train |= {"batch_size": settings.batch_size // processes, "gradient_accumulation": processes}
    train |= {"packing": False, "nonzero_warmup": True}
    train |= {"save_every": max(1, -(-settings.steps // MARKS)), "keep_checkpoints": MARKS + 1}
    shared = {"model": model, "data": {"path": str(data), **split}, "train": train, "seed": settings.seed}
    shared = absolute_paths(shared, Path.cwd())  # recipes are read from their own folders
    recipes = {}
    for key, method in methods.items():
        block = method.block(settings.rank, settings.principal_rank)
        try:
            if method.preset:
                block["target_modules"] = default_targets(network, method.preset)
            recipes[key] = TrainRecipe.model_validate({**shared, "method": block})
            fitting_config(recipes[key].method, network)
        except ValidationError as error:
            raise ConfigError(f"setting {first_problem(error)}") from None
        except ConfigError as error:
            raise ConfigError(f"method {key}: {error}; {way_out}") from error
    return recipes


def _has_one_kind(network: Any) -> bool:
    """Whether a model has no MLPs beside attention, so that every preset adapts all of its linear layers."""
    try:
        return default_targets(network) == default_targets(network, "paper")
    except ConfigError:  # one of the two
        return False


def _questions(path: str | os.PathLike | None) -> list[str]:
    """Return the questions of a file, one a line, else the built-in ones."""
    if path is None:
        return list(QUESTIONS)
    try:
        lines = decoded(Path(path).read_bytes(), Path(path)).splitlines()
    except OSError as error:
        raise DataError(f"--prompts {path}: cannot be read ({first_line(error)}); give a text file") from None
    questions = [line.strip() for line in lines if line.strip()]
    if not questions:
        raise DataError(f"--prompts {path}: is empty; give one prompt a line")
    return questions


def _notes(texts: Mapping[str, str], train: Sequence[Example]) -> list[str]:
    shares = overlap(texts, [example.prompt + example.response for example in train])
    return [
        *(
            f"{share:.0%} of the drift text “{name}” stands in the training data too: its drift says little."
            for name, share in shares.items()
            if share
        ),
        "One run of each method with one seed: small differences may be chance.",
        f"KL divergence in nats per token: at {SMALL} answers are worded differently, "
        "around 1 they are other answers.",
    ]
