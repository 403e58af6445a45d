"""`hiplora compare`: what LoRA and HiP-LoRA do to a model on your data, read at equal learning.

Every adapter, at marks along its training and scaled down after it, is one point: what it learned (loss on held-out
rows) and what it disturbed (drift on other text). The methods are compared where all have learned the same.
"""

import contextlib
import functools
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hiplora import __version__
from hiplora.adapters import read_update
from hiplora.compare_report import SMALL, Results, at_equal_learning, write_report
from hiplora.data.encoding import encode_examples
from hiplora.data.examples import Example, load_data
from hiplora.data.rows import decoded
from hiplora.data.texts import drift_texts, overlap
from hiplora.errors import ConfigError, DataError, first_line, first_problem
from hiplora.evaluation import Encoded, heldout_loss
from hiplora.evaluation.answers import chat_prompt, side_by_side
from hiplora.evaluation.mounting import load_model
from hiplora.evaluation.updates import DRIFT_TOKENS, measure_updates
from hiplora.models import load_tokenizer, skeleton
from hiplora.positions import position_limit, within_context
from hiplora.provenance import file_sha256, folder_identity, json_sha256, provenance
from hiplora.run_folder import RunFolder
from hiplora.training import TrainRecipe, train
from hiplora.training.adapt import fitting_config
from hiplora.training.reading import absolute_paths, model_problem
from hiplora.tuner import default_targets
from hiplora.tuner.experts import can_unroll

HELDOUT_LIMIT = 48  # held-out rows at most: all methods are measured on the same, at some ten points each
ANSWER_TOKENS = 48
MARKS = 4  # points along a training
SCALES = (0.25, 0.5, 0.75)  # of a finished adapter, besides 1
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

Tell = Callable[[str], None]


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
    long it will take. ConfigError or DataError if settings, model, data or `out` cannot be used, before a model loads.
    """
    settings = settings or CompareSettings()
    way_out = "name other --methods, or train from a recipe of your own (hiplora init)"
    recipes = method_recipes(model, data, settings, way_out)
    texts, questions = drift_texts(settings.drift_text), _questions(settings.prompts)
    trainings = Trainings("compare", model, data, recipes, settings)
    tokenizer, limit, rows = trainings.tokenizer, trainings.limit, trainings.rows

    def fits(prompt: Example | str) -> bool:
        return len(tokenizer(_prompt_text(tokenizer, prompt))["input_ids"]) < limit

    own_rows = [example for example in rows.held_out if example.prompt and fits(example)][:OWN_ROWS]
    if too_long := next((question for question in questions if not fits(question)), None):
        raise ConfigError(f"--prompts: {too_long[:40]!r} fills the model's context of {limit} tokens; shorten it")
    folder, titles = RunFolder(Path(out), "plan.json", "results.json"), {key: METHODS[key].title for key in recipes}
    with trainings.measured(folder, titles, texts, questions, overwrite=overwrite, tell=tell) as (shared, runs):
        adapts = {key: METHODS["lora" if _has_one_kind(skeleton(model)) else key].adapts for key in recipes}
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


class Trainings:
    """Recipes that train one model on the same rows, to be measured along the way; `base` loads the bare model once.

    `settings`, a dataclass, made the recipes. ConfigError or DataError if model or data cannot be used.
    """

    def __init__(
        self, kind: str, model: str, data: str | os.PathLike, recipes: Mapping[str, TrainRecipe], settings: Any
    ) -> None:
        self.kind, self.model, self.data, self.recipes, self.settings = kind, model, data, recipes, settings
        self.tokenizer, self.limit = load_tokenizer(model), position_limit(skeleton(model)) or sys.maxsize
        self.rows = load_data(next(iter(recipes.values())).data, chat=bool(self.tokenizer.chat_template))
        self.length = min(settings.max_length, self.limit)
        self.base = functools.cache(lambda: Base(model, self.rows.held_out, settings.max_length))

    @contextlib.contextmanager
    def measured(
        self,
        folder: RunFolder,
        titles: Mapping[str, str],
        texts: Mapping[str, str],
        questions: Sequence[str] = (),
        *,
        overwrite: bool,
        tell: Tell,
    ) -> Iterator[tuple[Results, dict[str, Results]]]:
        """Train and measure every recipe in a folder that goes on where it stopped; claimed inside the block.

        Yields what results say of model, data and base, and by recipe what the training cost, with held-out loss and
        drift at marks along it (`trained`) and at each scale of the finished adapter (`scaled`). Its adapter is in
        `adapters/KEY`. ConfigError if the folder holds a run with other settings, data or texts, or other `questions`.
        """
        identity = folder_identity(self.model)
        plan = {
            "kind": self.kind,
            "hiplora": __version__,
            "settings": {n: v for n, v in asdict(self.settings).items() if n not in ("drift_text", "prompts")},
            "texts_sha256": json_sha256([texts, questions]),
            "data_sha256": file_sha256(self.data),
            "model": self.model if identity is None else None,  # a folder may have moved
            "model_sha256": identity,
        }
        folder.check(plan, overwrite=overwrite, inputs={"the base model": self.model, "the data": self.data})
        adapters = {key: folder.path / "adapters" / key for key in self.recipes}
        with folder.claimed(plan, overwrite=overwrite):
            base = folder.stage("base", lambda: self.base().read())
            tell(self._expected(base["seconds_per_token"]))
            self.base.cache_clear()  # a training loads the model itself
            runs = {}
            with _notes_once():
                for key, recipe in self.recipes.items():
                    work = functools.partial(_train, recipe, titles[key], adapters[key])
                    runs[key] = folder.stage(f"train-{key}", work)
            for key, adapter in adapters.items():
                runs[key] |= folder.stage(f"measure-{key}", functools.partial(_measure, self.base, adapter, texts))
            shared = {
                "kind": self.kind,
                "model": self.model,
                "data": {**self.rows.sources["train"], "held_out_rows": len(self.rows.held_out)},
                "base": {"held_out_loss": base["held_out_loss"]},
                "provenance": provenance(plan_sha256=json_sha256(plan)),
            }
            yield shared, runs
            for adapter in adapters.values():
                shutil.rmtree(adapter / "checkpoints", ignore_errors=True)

    def _expected(self, seconds_per_token: float) -> str:
        """Say how long the trainings will take, by the time that the base model took to read a token."""
        train, count = next(iter(self.recipes.values())).train, len(self.recipes)
        steps: int = train.steps  # type: ignore[assignment]  # `method_recipes` sets no epochs
        rows = steps * train.batch_size
        trained = encode_examples(self.tokenizer, self.rows.train, self.length)[1]
        length = trained.tokens / trained.sequences
        points = (MARKS + len(SCALES)) * (HELDOUT_LIMIT * length + 2 * DRIFT_TOKENS)
        seconds = count * seconds_per_token * (4 * rows * length + points)  # a step also goes back, at 3 : 1
        passes = f"{rows / trained.sequences:.1f} passes over {trained.sequences} rows"
        unit = "methods" if self.kind == "compare" else "settings"
        return (
            f"{count} {unit}, {steps} steps of {train.batch_size} rows each ({passes}): about "
            f"{max(1, round(seconds / 60))} min, and once some more to measure the model"
        )


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
    train = {name: getattr(settings, name) for name in ("steps", "lr", "batch_size", "max_length")}
    train |= {"gradient_accumulation": 1, "packing": False, "nonzero_warmup": True}
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


class Base:
    """The bare base model, loaded once, and the held-out rows as it reads them."""

    def __init__(self, model: str, held_out: Sequence[Example] = (), max_length: int = 512):
        self.model, self.tokenizer = load_model(model)
        length = within_context(max_length, self.model)
        rows = encode_examples(self.tokenizer, held_out, length)[0] if held_out else []
        self.held_out = [Encoded(tuple(row["input_ids"]), tuple(row["labels"])) for row in rows]

    def read(self) -> Results:
        """Return the loss on the held-out rows, and the seconds that a token took to read."""
        start = time.perf_counter()
        loss = heldout_loss(self.model, self.held_out)
        tokens = sum(len(row.ids) for row in self.held_out)
        return {"held_out_loss": loss, "seconds_per_token": (time.perf_counter() - start) / tokens}

    def answers(
        self, adapters: Mapping[str, Path], prompts: Sequence[Example | str], tokens: int = ANSWER_TOKENS
    ) -> list[dict[str, str]]:
        """Return what the base and each adapter answer: to a question in a chat, to an example's prompt as trained."""
        texts = [_prompt_text(self.tokenizer, prompt) for prompt in prompts]
        rows = side_by_side(self.model, self.tokenizer, adapters, texts, tokens)
        return [{name: text.strip() for name, text in row.items()} for row in rows]


def _prompt_text(tokenizer: Any, prompt: Example | str) -> str:
    """Return what the model reads of a question, or of an example's prompt."""
    if isinstance(prompt, str):
        return chat_prompt(tokenizer, [{"role": "user", "content": prompt}])
    turns = [dict(message) for message in prompt.messages[:-1]]
    return chat_prompt(tokenizer, turns) if turns else prompt.prompt


def _measure(base: Callable[[], Base], adapter: Path, texts: Mapping[str, str]) -> Results:
    """Measure an adapter at the marks along its training, and the finished one at each scale."""
    steps = sorted(int(path.name.rpartition("-")[2]) for path in (adapter / "checkpoints").glob("checkpoint-*"))
    if not steps:
        raise ConfigError(f"{adapter}: has no checkpoints to measure any more; pass --overwrite to start anew")
    finished = read_update(adapter)
    marks = {f"step {step}": read_update(adapter / "checkpoints" / f"checkpoint-{step}") for step in steps[:-1]}
    scaled = {f"scale {scale}": finished.scaled(scale) for scale in SCALES}
    updates = {**marks, **scaled, "end": finished}
    # A few steps at a small rate may change no logit.
    drift, loss = measure_updates(
        base().model, base().tokenizer, updates, texts, base().held_out, may_be_nothing=marks
    )
    points = {name: {"held_out_loss": loss[name], "drift": drift[name]} for name in updates}
    return {
        "trained": [{"step": step, **points[name]} for step, name in zip(steps, [*marks, "end"], strict=True)],
        "scaled": [
            {"scale": scale, **points[name]} for scale, name in zip((*SCALES, 1.0), [*scaled, "end"], strict=True)
        ],
    }


@contextlib.contextmanager
def _notes_once() -> Iterator[None]:
    """Log once what every training would log of the data."""
    log, logged = logging.getLogger("hiplora.training"), set[str]()

    def is_new(record: logging.LogRecord) -> bool:
        repeated = record.getMessage() in logged
        logged.add(record.getMessage())
        return not repeated

    log.addFilter(is_new)
    try:
        yield
    finally:
        log.removeFilter(is_new)


def _train(recipe: TrainRecipe, title: str, out: Path) -> Results:
    result = train(recipe, out, resume=True, description=title)
    cost = ("trainable_parameters", "seconds", "tokens")
    return {"lr": recipe.train.lr, **{name: getattr(result, name) for name in cost}}


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
