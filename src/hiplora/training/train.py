"""Supervised fine-tuning of an adapter: from a recipe to a finished output folder.

recipe.yaml           the resolved recipe; written first
metrics.jsonl         one row per logged step
checkpoints/          checkpoint-<step>; run.json, the hashes of the data; start/, of a method that moves the base
adapter_model.safetensors, README.md, provenance.json
adapter_config.json   written last: without it the run is not complete, and nothing loads

Under torchrun or `accelerate launch` every process runs all of this; the first one writes. torch and its relatives
are imported in functions, so that a recipe is checked first.
"""

import contextlib
import errno
import json
import logging
import math
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hiplora.data.examples import load_data
from hiplora.devices import machine_dtype, torch_dtype
from hiplora.errors import ConfigError, DivergedError, first_line
from hiplora.extras import require
from hiplora.files import write_atomic
from hiplora.models import load_tokenizer
from hiplora.provenance import file_sha256, json_sha256, provenance
from hiplora.run_folder import RunFolder
from hiplora.training.adapt import check_fit, check_trackers, put_on, save_trained, start_problem
from hiplora.training.method import CONFIG_FILE, WEIGHTS_FILE
from hiplora.training.recipe import TrainRecipe
from hiplora.training.result import PROVENANCE_FILE, TrainResult, model_card, peak_bytes
from hiplora.training.sequences import Rows, count_steps, duration, keeps_rows_apart, sequences, tokenized

if TYPE_CHECKING:
    from transformers import TrainerCallback
    from trl import SFTConfig

    from hiplora.training.trainer import AdapterTrainer

FULL = 2**20  # bytes free below which a failed write needs no other explanation
log = logging.getLogger("hiplora.training")


def train(
    recipe: TrainRecipe,
    out: str | os.PathLike,
    *,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: "Sequence[TrainerCallback]" = (),
    description: str = "train",
) -> TrainResult:
    """Train an adapter and write it, its card, recipe, metrics and provenance to the folder `out`.

    Everything in the recipe is checked, the data to the last row, before the model is loaded. An unfinished run of the
    same recipe in `out` goes on from its last checkpoint, step for step as if it had not been stopped; with `resume` a
    finished one is returned instead of refused. `description` is the name of the progress bar on a terminal's stderr.
    The logger "hiplora.training" gets, as INFO, the cost and, where there is no bar, a line for every logged step.

    Raises:
        KeyboardInterrupt: Ctrl-C, or SIGTERM, after a checkpoint of the step that ran; a second one stops at once.
        ConfigError: the recipe, the model or the output folder cannot be used.
        DataError: the data cannot be used; names rows with their lines.
        DivergedError: the loss or the adapter is not finite.
        OSError: a checkpoint or the result cannot be written; the run can be carried on.
    """
    import torch
    from accelerate import PartialState

    recipe, run = _for_this_machine(recipe), RunFolder(Path(out), "recipe.yaml", CONFIG_FILE)
    run.check(recipe.values(), resume=resume, overwrite=overwrite, inputs=recipe.inputs())
    if run.complete and not overwrite:
        log.warning("%s holds this run already, finished; nothing to do", run.path)
        return TrainResult.read(run.path)
    if problem := start_problem(recipe):
        raise ConfigError(problem)
    bare, tokenizer = check_fit(recipe), load_tokenizer(recipe.model)
    data = load_data(recipe.data, chat=bool(tokenizer.chat_template))
    rows = tokenized(recipe, data, tokenizer, bare)
    sources = dict(data.sources)
    if recipe.train.start_from is not None:
        start = Path(recipe.train.start_from)
        sources["start"] = {"folder": start.name, "sha256": file_sha256(start / WEIGHTS_FILE)}
    processes = PartialState(cpu=not torch.cuda.is_available())
    processes.wait_for_everyone()  # all have looked at the folder before the first one writes
    with contextlib.ExitStack() as stack:
        stack.enter_context(_full_disk_explained(run.path))
        _silence_libraries(stack)
        if processes.is_main_process:
            stack.enter_context(run.claimed(recipe.values(), overwrite=overwrite))
            _check_inputs(run.path / "checkpoints", sources)
        processes.wait_for_everyone()
        try:
            trainer, notes, encoding = _trainer(recipe, run.path, rows, callbacks, description)
            result = _run(recipe, run.path, trainer, notes, {"sources": sources, "encoding": encoding})
            if processes.is_main_process:
                _assemble(recipe, run.path, trainer, result, data.train[0])
                if recipe.train.push_to_hub is not None:
                    from hiplora.adapters import push_to_hub

                    push_to_hub(run.path, recipe.train.push_to_hub)
        except BaseException:
            if processes.is_main_process and not any(run.path.glob("checkpoints/checkpoint-*")):
                shutil.rmtree(run.path, ignore_errors=True)  # nothing to carry on from
            raise
        processes.wait_for_everyone()
    return result


def _trainer(
    recipe: TrainRecipe, out: Path, encoded: Rows, callbacks: "Sequence[TrainerCallback]", description: str
) -> "tuple[AdapterTrainer, list[str], dict[str, int]]":
    """Return the trainer of an adapted model, notes for the user on the data, and counts of rows and tokens."""
    import torch
    from accelerate import PartialState

    from hiplora.data.texts import drift_texts
    from hiplora.evaluation.drift import BaseReference
    from hiplora.models import load
    from hiplora.training.losses import TokenLoss, kl_penalty
    from hiplora.training.trainer import AdapterTrainer, Record
    from hiplora.training.widen import put_on_widened

    method, settings, processes = recipe.method, recipe.train, PartialState()
    model, tokenizer = load(
        recipe.model, torch_dtype(settings.dtype), processes.device if settings.load_in_4bit else None
    )
    if torch.cuda.is_available():
        if not settings.load_in_4bit:  # such a model is on the device already
            model.to(processes.device)
        torch.cuda.reset_peak_memory_stats()
    # Packed rows must be flattened. On a CPU other rows are too, which saves the padding.
    flat = (settings.packing or not torch.cuda.is_available()) and keeps_rows_apart(model)
    if settings.packing and not flat:
        kind = type(model).__name__
        raise ConfigError(f"train.packing: rows that share a sequence see each other in {kind}; set it to false")
    reference = None
    if settings.drift_tokens and not method.moves_base and not recipe.widens:
        reference = BaseReference.build(model, tokenizer, drift_texts(), max_tokens=settings.drift_tokens)
    with processes.main_process_first():  # it samples and calibrates; the others read its results from the cache
        rows, held_out, notes, encoding = sequences(recipe, encoded, model)
        steps, penalty = count_steps(recipe, len(rows)), kl_penalty(recipe, model, tokenizer)
        finished = Path(settings.start_from) if settings.start_from else None
        if finished and recipe.widens:
            adapted = put_on_widened(method, model, tokenizer, finished, seed=recipe.seed, steps=steps)
        else:
            start = out / "checkpoints" / "start"
            adapted = put_on(method, model, tokenizer, seed=recipe.seed, start=start, steps=steps, start_from=finished)
    session = method.session(adapted, len(rows))
    token_loss = TokenLoss(settings.token_weight, settings.masked_kl_weight)
    # TRL's loss needs the model below the output head, which some do not name, as Llama 3.2 Vision's for text.
    trl_loss_fits = token_loss.kind not in ("eaft", "dft") and not token_loss.own_kl and model.base_model is not model
    trainer = AdapterTrainer(
        model=adapted,
        args=_arguments(recipe, out / "checkpoints", steps, flat),
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=list(callbacks),
        session=session,
        record=Record(out, settings, description),
        penalties=[*([penalty] if penalty else []), *session.penalties],
        token_loss=None if trl_loss_fits else token_loss,
        reference=reference,
    )
    return trainer, notes, encoding


def _run(
    recipe: TrainRecipe, out: Path, trainer: "AdapterTrainer", notes: list[str], data: dict[str, Any]
) -> TrainResult:
    """Train, from the last checkpoint if there is one, and go back to the step whose adapter is the result."""
    from hiplora.training.trainer import last_checkpoint

    record, steps, main = trainer.record, trainer.args.max_steps, trainer.is_world_process_zero()
    for note in notes if main else ():
        log.warning("%s", note)
    last = last_checkpoint(out / "checkpoints")
    if log.isEnabledFor(logging.INFO) and main:
        used = data["encoding"]["examples"] - data["encoding"]["left_out"]
        log.info("%s", f"{used:,} rows, {_cost(recipe, trainer)}")
    with _stoppable(record):
        if last is not None:
            log.warning("carrying on from step %s of %s", last.name.rpartition("-")[2], steps)
            trainer.carry_on(last)
        else:
            trainer.train()
    if record.interrupted:
        raise KeyboardInterrupt(f"stopped at step {trainer.state.global_step} of {steps}")
    done = record.return_to_best()
    if record.why:
        notes.append(f"{record.why}; the adapter is that of step {done} of {steps}")
    losses = {row.get("step", 0): row["held_out_loss"] for row in record.rows if "held_out_loss" in row}
    if losses and done not in losses:
        losses[done] = trainer.held_out_loss()
    return TrainResult(
        adapter=out,
        metrics=record.rows,
        steps=done,
        tokens=record.tokens,
        seconds=record.seconds,
        trainable_parameters=trainer.model.get_nb_trainable_parameters()[0],
        peak_memory_bytes=peak_bytes(),
        held_out={"before": losses[0], "after": losses[done]} if losses else None,
        data=data,
        warnings=notes,
        drift=trainer.drift(),
    )


def _cost(recipe: TrainRecipe, trainer: "AdapterTrainer") -> str:
    """Return how much a training reads, and about how long it takes."""
    rows, steps, settings = trainer.train_dataset, trainer.args.max_steps, recipe.train
    # An epoch ends with a step, however few batches are left for it.
    epoch = math.ceil(recipe.method.batches(len(rows), settings.batch_size) / settings.gradient_accumulation)
    tokens = sum(map(len, rows["input_ids"]))
    cost = f"{tokens:,} tokens, {steps} step{'s' * (steps > 1)}"
    if steps > epoch:
        cost += f" = {steps / epoch:.1f} passes"
    if trainer.accelerator.num_processes > 1:  # TRL's loss gathers from all processes
        return cost
    return f"{cost}, about {duration(tokens * steps / epoch * trainer.seconds_per_token())}"


@contextlib.contextmanager
def _stoppable(record: Any) -> Iterator[None]:
    """Have Ctrl-C and SIGTERM end the training after the current step, with a checkpoint; a second one at once."""

    def stop(number: int, frame: Any) -> None:
        if record.interrupted:
            raise KeyboardInterrupt
        record.interrupted = True
        log.warning("stopping after this step, with a checkpoint; once more stops at once")

    main = threading.current_thread() is threading.main_thread() and os.environ.get("WORLD_SIZE", "1") == "1"
    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM) if main}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _assemble(recipe: TrainRecipe, out: Path, trainer: "AdapterTrainer", result: TrainResult, example: Any) -> None:
    """Write the adapter, its card and its provenance to a staging folder, then move them, the configuration last."""
    from safetensors.torch import load_file

    from hiplora.training.widen import join_saved

    values = recipe.values()
    origin = provenance(
        recipe=values,
        recipe_sha256=json_sha256(values),
        seed=recipe.seed,
        data=result.data["sources"],
        device=str(trainer.args.device),
        result=result.summary(),
    )
    staged = out / ".final.part"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    with trainer.session.measuring():
        save_trained(recipe.method, trainer.model, staged, out / "checkpoints" / "start")
    if recipe.widens:
        join_saved(staged, Path(str(recipe.train.start_from)))
    for name, value in load_file(staged / WEIGHTS_FILE).items():
        if not value.isfinite().all():
            raise DivergedError(f"the trained adapter is not finite ({name}); lower train.lr, and pass --overwrite")
    write_atomic(staged / "README.md", model_card(recipe, result, example))
    write_atomic(staged / PROVENANCE_FILE, json.dumps(origin, indent=2) + "\n")
    os.sync()
    for path in sorted(staged.iterdir(), key=lambda path: path.name == CONFIG_FILE):
        path.replace(out / path.name)
    staged.rmdir()


def _for_this_machine(recipe: TrainRecipe) -> TrainRecipe:
    """Replace `dtype: auto` by what this machine has; refuse what cannot run here."""
    import torch

    processes, passes = int(os.environ.get("WORLD_SIZE", "1")), recipe.train.gradient_accumulation
    if passes % processes:
        share = f"is no multiple of the {processes} processes that share it; change one of them"
        raise ConfigError(f"train.gradient_accumulation {passes} {share}")
    if processes > 1 and recipe.method.name == "split_lora":
        raise ConfigError("method split_lora simulates clients in one process; start it without a launcher")
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        if os.environ.get(name) == "true":
            raise ConfigError(f"{name} is set, and hiplora train shards no model; launch it without: that is DDP")
    check_trackers(recipe.train.report_to)
    if recipe.train.load_in_4bit:
        require("quant")
    dtype = recipe.train.dtype
    if dtype == "fp16" and not torch.cuda.is_available():
        raise ConfigError("train.dtype: fp16 needs a GPU (its loss scaling does); use bf16 or fp32 here")
    settings = recipe.train.model_copy(update={"dtype": machine_dtype() if dtype == "auto" else dtype})
    return recipe.model_copy(update={"train": settings})


def _check_inputs(folder: Path, sources: dict[str, Any]) -> None:
    """Check that what a run reads is what it read when it began."""
    file = folder / "run.json"
    what = "the data changed since this run began, or the adapter that it started from; put them back"
    try:
        same = not file.is_file() or json.loads(file.read_text(encoding="utf-8")) == sources
    except (ValueError, RecursionError) as error:
        same, what = False, f"checkpoints/{file.name}, by which a run is continued, is damaged ({first_line(error)})"
    if not same:
        raise ConfigError(f"--out {folder.parent}: {what}, or pass --overwrite to start anew")
    write_atomic(file, json.dumps(sources, indent=2))


def _arguments(recipe: TrainRecipe, folder: Path, steps: int, flat: bool) -> "SFTConfig":
    import torch
    from accelerate import PartialState
    from trl import SFTConfig

    settings, gpu = recipe.train, torch.cuda.is_available()
    arguments = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation // PartialState().num_processes,
        max_steps=steps,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine" if settings.lr_scheduler == "cosine" else "constant_with_warmup",
        warmup_steps=settings.warmup_steps(steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch",
        use_cpu=not gpu,
        bf16=settings.dtype == "bf16",
        fp16=settings.dtype == "fp16",
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        seed=recipe.seed,
        # The rows come tokenized, cut and packed.
        padding_free=flat,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        save_strategy="steps" if settings.max_drift is None else "no",  # with max_drift the record saves
        save_steps=settings.save_every,
        logging_strategy="no",  # the record logs
        report_to=settings.report_to,
        disable_tqdm=True,
        dataloader_pin_memory=gpu,
        ddp_broadcast_buffers=False,  # HiP-LoRA's buffers are frozen and equal already
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process uses one GPU; the Trainer would wrap the model in DataParallel
    return arguments


@contextlib.contextmanager
def _full_disk_explained(out: Path) -> Iterator[None]:
    """Turn whatever a writer raises on a full disk into an OSError with the way out."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        place = next(path for path in (out, *out.absolute().parents) if path.exists())
        other = isinstance(error, OSError) and error.errno not in (None, errno.ENOSPC, errno.EDQUOT)
        if other or (not isinstance(error, SafetensorError) and shutil.disk_usage(place).free >= FULL):
            raise
        way = "make room and run the same command again: it carries on from the last checkpoint"
        raise OSError(f"{out} cannot be written ({first_line(error)}); {way}") from error


def _silence_libraries(stack: contextlib.ExitStack) -> None:
    """Keep the libraries' own bars and advice off the terminal until the stack closes."""
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    stack.callback(transformers_logging.set_verbosity, transformers_logging.get_verbosity())
    transformers_logging.set_verbosity_error()
    trl = logging.getLogger("trl")
    stack.callback(trl.setLevel, trl.level)
    trl.setLevel(logging.ERROR)
    stack.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore", FutureWarning)  # the libraries' notes to each other
