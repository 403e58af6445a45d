"""Supervised fine-tuning of an adapter: from a recipe to a finished output folder."""

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import datasets
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from hiplora.errors import ConfigError, DivergedError
from hiplora.files import write_atomic
from hiplora.models import load
from hiplora.provenance import json_sha256, provenance
from hiplora.recipes import TrainRecipe, model_problems
from hiplora.training.adapters import WEIGHTS_FILE, save_adapter
from hiplora.training.build import build_trainer, sequences, total_steps
from hiplora.training.card import model_card
from hiplora.training.checkpoints import step_of
from hiplora.training.data import TrainingData, load_data
from hiplora.training.encoding import EncodingReport, encode_examples
from hiplora.training.memory import peak_bytes, reset_peak
from hiplora.training.metrics import OnStep, Record
from hiplora.training.moved import restore_start, save_difference, save_start, take_start
from hiplora.training.result import PROVENANCE_FILE, TrainResult, held_out_losses
from hiplora.training.run import RunFolder, assembled, check_claim, claimed, recipe_values
from hiplora.training.start import Start, given_start
from hiplora.training.trainer import RecordingTrainer

OnText = Callable[[str], None]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(
    recipe: TrainRecipe,
    out: str | os.PathLike,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_step: OnStep | None = None,
    on_phase: OnText | None = None,
    on_note: OnText | None = None,
) -> TrainResult:
    """Train an adapter and write it, its card, recipe, metrics and provenance to `out`.

    Everything of the recipe is checked, the data to the last row, before the model is loaded. An unfinished run
    of the same recipe in `out` goes on from its last checkpoint, step for step as if it had not been stopped;
    `on_note` is told so. It may be killed at any moment: `out` has an adapter_config.json, without which no
    adapter loads, only when it is complete.

    Args:
        recipe: what to train.
        out: the output folder.
        resume: return the result if the run in `out` is finished already, instead of refusing.
        overwrite: replace what is in `out`.
        on_step: called with every row of the metrics, and the total number of steps under `steps`.
        on_phase: called with what is being done, in words, where it may take a while.
        on_note: called with what a person should know: a run that is carried on, rows that are cut or left out.

    Raises:
        ConfigError: the recipe, the model or the output folder cannot be used.
        DataError: the data cannot be used; rows are named with their lines.
        DivergedError: the loss or the adapter is no longer finite.
        OSError: a checkpoint or the result cannot be written; the run can be carried on.
    """
    say, note = on_phase or _unheard, on_note or _unheard
    recipe, run = _settle(recipe), RunFolder(Path(out))
    check_claim(run, recipe, resume, overwrite)
    if run.complete and not overwrite:
        note(f"{run.path} holds this run already, finished; nothing to do")
        return TrainResult.read(run.path)
    say("reading the data")
    data, start = load_data(recipe.data), given_start(recipe, run.path)
    sources = {**data.sources, "start": start.record()} if start else data.sources
    if start and (warning := start.warning(recipe.model)):
        note(warning)
    with claimed(run, recipe, sources, overwrite), _quiet():
        if resume and run.last_checkpoint is None:
            note(f"{run.path} has no checkpoint to carry on from; starting at the beginning")
        say(f"loading {Path(recipe.model).name}")
        model, tokenizer = load(recipe.model, DTYPES[recipe.train.dtype])
        if torch.cuda.is_available():
            model.to("cuda")
        train_set, held_out, report = _encode(recipe, data, tokenizer, say, note)
        steps = total_steps(recipe.train, len(train_set), getattr(recipe.method, "clients", 1))
        record = Record(run.path, steps, recipe.train.log_every, on_step)
        say(f"putting {recipe.method.name} adapters on")
        trainer = build_trainer(recipe, run, model, tokenizer, train_set, held_out, record, steps, start)
        _fit(trainer, run, recipe, start, note)
        return _finish(trainer, run, recipe, data, start, report)


def machine_dtype() -> Literal["bf16", "fp32"]:
    """Return the precision of `train.dtype: auto` on this machine."""
    gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if gpu else "fp32"


def _unheard(text: str) -> None:
    """Where nobody listens."""


def _settle(recipe: TrainRecipe) -> TrainRecipe:
    """Replace what depends on the machine by what this machine has, or say why it cannot."""
    if problems := model_problems(recipe.model):
        raise ConfigError("\n".join(problems))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "WORLD_SIZE is above 1: training runs in one process on one device; start it without a launcher"
        )
    dtype = recipe.train.dtype
    if dtype == "fp16" and not torch.cuda.is_available():
        raise ConfigError("train.dtype: fp16 needs a GPU (its loss scaling does); use bf16 or fp32 here")
    if dtype == "auto":
        dtype = machine_dtype()
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"dtype": dtype})})


def _encode(
    recipe: TrainRecipe, data: TrainingData, tokenizer: PreTrainedTokenizerBase, say: OnText, note: OnText
) -> tuple[Dataset, Dataset | None, EncodingReport]:
    say(f"tokenising {len(data.train):,} rows")
    rows, report = encode_examples(tokenizer, data.train, recipe.train.max_length)
    for warning in _warnings(recipe, report):
        note(warning)
    held_out = None
    if data.held_out:
        kept_back, _ = encode_examples(tokenizer, data.held_out, recipe.train.max_length)
        held_out = sequences(kept_back, recipe.train)
    return sequences(rows, recipe.train), held_out, report


def _warnings(recipe: TrainRecipe, report: EncodingReport) -> list[str]:
    """Say what of the data was cut or left out, and whether the basis keeps the task itself from being learned."""
    said = report.warnings(recipe.train.max_length)
    if recipe.method.name == "osf" and recipe.train.weight_decay:
        said.append(
            f"method osf trains a part of the weights themselves, which train.weight_decay {recipe.train.weight_decay} "
            "shrinks; set it to 0"
        )
    text = getattr(recipe.method, "calibration_text", None)
    if (
        text is not None
        and recipe.data.path is not None
        and Path(text).resolve() == Path(recipe.data.path).resolve()
    ):
        said.append(
            "method.calibration_text is the training data: what the layers do on it is protected from being changed, "
            "so little will be learned; calibrate on other text, or leave it out to sample text from the model"
        )
    return said


def _fit(
    trainer: RecordingTrainer, run: RunFolder, recipe: TrainRecipe, start: Start | None, note: OnText
) -> None:
    """Train to the last step, from the last checkpoint if there is one."""
    checkpoint, steps = run.last_checkpoint, trainer.args.max_steps
    if recipe.method.moves_base:
        _to_its_start(trainer.adapted, run, start)
    if start is not None:
        start.put_on(trainer.adapted)
    if checkpoint is None:
        trainer.record.rewrite()
    else:
        trainer.record.restore(checkpoint)
        note(f"carrying on from step {step_of(checkpoint):,} of {steps:,}")
    reset_peak()
    if checkpoint is not None and step_of(checkpoint) == steps:  # stopped between the last step and the end
        trainer.take_adapter(checkpoint)
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.record.peak_memory = max(trainer.record.peak_memory, peak_bytes())


def _to_its_start(model: PeftModel, run: RunFolder, start: Start | None) -> None:
    """Have a model that moves the base at its run's start, which is kept, or at that of the adapter it is given."""
    if run.last_checkpoint is not None:
        restore_start(model, run.start)
        return
    if start is not None:
        take_start(model, start.origin())
    save_start(model, run.start)


def _finish(
    trainer: RecordingTrainer,
    run: RunFolder,
    recipe: TrainRecipe,
    data: TrainingData,
    start: Start | None,
    report: EncodingReport,
) -> TrainResult:
    """Assemble the output folder and return what is in it."""
    record, model = trainer.record, trainer.adapted
    result = TrainResult(
        adapter=run.path,
        metrics=record.rows,
        steps=trainer.args.max_steps,
        tokens=record.tokens,
        seconds=record.seconds,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        peak_memory_bytes=record.peak_memory,
        held_out=held_out_losses(record.rows),
        data={"shape": data.shape, "sources": data.sources, "encoding": report.as_dict()},
        warnings=_warnings(recipe, report),
    )
    values = recipe_values(recipe)
    origin = provenance(
        recipe=values,
        recipe_sha256=json_sha256(values),
        seed=recipe.seed,
        data=data.sources,
        **({"start": start.record()} if start else {}),
        device=str(trainer.args.device),
        result=result.summary(),
    )
    with assembled(run) as aside:
        if recipe.method.moves_base:
            save_difference(model, aside, run.start)
        else:
            save_adapter(model, aside)
        _check_finite(aside / WEIGHTS_FILE)
        write_atomic(aside / "README.md", model_card(recipe, result))
        write_atomic(aside / PROVENANCE_FILE, json.dumps(origin, indent=2) + "\n")
    return result


def _check_finite(weights: Path) -> None:
    with safe_open(weights, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            if not torch.isfinite(file.get_tensor(name)).all():
                raise DivergedError(
                    f"the trained adapter is not finite ({name}); lower train.lr and start anew with --overwrite"
                )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' own bars and advice off the terminal: a run says itself what it does."""
    bars, level = not datasets.are_progress_bars_disabled(), transformers_logging.get_verbosity()
    datasets.disable_progress_bars()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the libraries' notes to each other
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()
