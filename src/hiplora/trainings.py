"""Train one model by several recipes on the same rows, and measure each along the way and at several scales."""

import contextlib
import functools
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from hiplora import __version__
from hiplora.adapters import read_update
from hiplora.compare_report import Results
from hiplora.data.encoding import encode_examples
from hiplora.data.examples import Example, load_data
from hiplora.errors import ConfigError
from hiplora.evaluation import Encoded, heldout_loss
from hiplora.evaluation.answers import chat_prompt, side_by_side
from hiplora.evaluation.mounting import load_model
from hiplora.evaluation.updates import DRIFT_TOKENS, measure_updates
from hiplora.models import load_tokenizer, skeleton
from hiplora.positions import position_limit, within_context
from hiplora.provenance import file_sha256, folder_identity, json_sha256, provenance
from hiplora.run_folder import RunFolder
from hiplora.training import TrainRecipe, train

HELDOUT_LIMIT = 48  # held-out rows at most: all trainings are measured on the same, at some ten points each
ANSWER_TOKENS = 48
MARKS = 4  # points along a training
SCALES = (0.25, 0.5, 0.75)  # of a finished adapter, besides 1

Tell = Callable[[str], None]


class Trainings:
    """Recipes that train one model on the same rows, to be measured along the way; `base` loads the bare model once.

    `network` is the model without weights; `settings`, a dataclass, made the recipes. Of several processes under a
    launcher all train, and the first one does the rest: it is the one that `leads`. ConfigError or DataError if model
    or data cannot be used.
    """

    def __init__(
        self, kind: str, model: str, data: str | os.PathLike, recipes: Mapping[str, TrainRecipe], settings: Any
    ) -> None:
        self.kind, self.model, self.data, self.recipes, self.settings = kind, model, data, recipes, settings
        self.leads = PartialState(cpu=not torch.cuda.is_available()).is_main_process
        self.network = skeleton(model)
        self.tokenizer, self.limit = load_tokenizer(model), position_limit(self.network) or sys.maxsize
        self.rows = load_data(next(iter(recipes.values())).data, chat=bool(self.tokenizer.chat_template))
        self.length = min(settings.max_length, self.limit)
        self.base = functools.cache(lambda: Base(model, self.rows.held_out, settings.max_length))

    def follow(self, folder: RunFolder) -> None:
        """Take part in the trainings of the process that `measured` in this folder."""
        for key, recipe in self.recipes.items():
            (finished,) = broadcast_object_list([None])
            if not finished:
                train(recipe, folder.path / "adapters" / key, resume=True)

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
                    broadcast_object_list([folder.has_stage(f"train-{key}")])
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
        processes = PartialState().num_processes
        rows = steps * train.batch_size * processes
        trained = encode_examples(self.tokenizer, self.rows.train, self.length)[1]
        length = trained.tokens / trained.sequences
        points = (MARKS + len(SCALES)) * (HELDOUT_LIMIT * length + 2 * DRIFT_TOKENS)
        # A step also goes back, at 3 : 1.
        seconds = count * seconds_per_token * (4 * rows * length / processes + points)
        passes = f"{rows / trained.sequences:.1f} passes over {trained.sequences} rows"
        unit = "methods" if self.kind == "compare" else "settings"
        return (
            f"{count} {unit}, {steps} steps of {train.batch_size * processes} rows each ({passes}): about "
            f"{max(1, round(seconds / 60))} min, and once some more to measure the model"
        )


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
        texts = [prompt_text(self.tokenizer, prompt) for prompt in prompts]
        rows = side_by_side(self.model, self.tokenizer, adapters, texts, tokens)
        return [{name: text.strip() for name, text in row.items()} for row in rows]


def prompt_text(tokenizer: Any, prompt: Example | str) -> str:
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
