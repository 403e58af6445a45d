"""TRL's SFTTrainer for adapters, and the callback that keeps the record of a run."""

import functools
import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback, TrainerState
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints
from trl import SFTTrainer

from hiplora.data.encoding import IGNORED
from hiplora.errors import AdapterError, DivergedError, HipLoraError
from hiplora.evaluation.drift import BaseReference, measure_drift
from hiplora.evaluation.likelihood import eval_mode
from hiplora.files import write_atomic
from hiplora.provenance import file_sha256
from hiplora.training.losses import TokenLoss
from hiplora.training.method import WEIGHTS_FILE, Penalty, Session
from hiplora.training.recipe import TrainSettings
from hiplora.training.result import METRICS_FILE, Row
from hiplora.training.sequences import duration
from hiplora.tuner import base_only

log = logging.getLogger("hiplora.training")
# TRL's metrics, for report_to; a resumed run counts them anew.
TRL_METRICS = ("entropy", "mean_token_accuracy", "num_tokens", "aux_loss")
PROGRESS_FILE = "progress.json"
HASHES_FILE = "hashes.json"  # of the other files; written last: a checkpoint without it is incomplete
REQUIRED_FILES = {PROGRESS_FILE, "trainer_state.json", WEIGHTS_FILE}  # of every checkpoint
PLAIN_LOSS = TokenLoss("none", 0.0)  # without a router's loss, as the Trainer's has it


class AdapterTrainer(SFTTrainer):
    """SFTTrainer with a method's session, penalties once a step, a loss of its own, and a held-out loss per token."""

    def __init__(
        self,
        *args: Any,
        session: Session,
        record: "Record",
        penalties: Sequence[Penalty] = (),
        token_loss: TokenLoss | None = None,
        reference: BaseReference | None = None,
        **kwargs: Any,
    ):
        """Take SFTTrainer's arguments, what is added to its loss or replaces it, and what to measure drift from."""
        self.session, self.record, self.penalties = session, record, penalties
        self.token_loss, self.reference = token_loss, reference
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        record.trainer = self
        self.add_callback(record)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Train on one micro-batch; the first ones of a step carry the penalties, one for each client."""
        record, clients, number = self.record, self.session.clients, self.record.micro_batch
        tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        with self.session.micro_batch(number):
            loss = super().training_step(model, inputs, num_items_in_batch)
            for penalty in self.penalties if number < clients else ():
                with self.compute_loss_context_manager():
                    value = penalty.value(self.model, self.state.global_step)
                self.accelerator.backward(penalty.weight / clients * value)
                record.penalties[penalty.name] = record.penalties.get(penalty.name, 0.0) + value.item() / clients
        record.add(loss, int(tokens))
        return loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return TRL's loss, or while training the loss of its own, of which DDP takes the mean over the processes."""
        if self.token_loss is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return self.token_loss(model, inputs, num_items_in_batch) * self.accelerator.num_processes

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the Trainer's schedule, its warm-up one step further on if the recipe says so."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.record.settings.nonzero_warmup and self.args.warmup_steps:
            warmup, lambdas = self.args.warmup_steps, scheduler.lr_lambdas
            scheduler.lr_lambdas = [lambda step, factor=factor: factor(step + (step < warmup)) for factor in lambdas]
            scheduler.last_epoch = -1
            scheduler._initial_step()
        return scheduler

    def seconds_per_token(self) -> float:
        """Time forward and backward on the first rows; change nothing."""
        rows = [self.train_dataset[index] for index in range(min(self.args.train_batch_size, len(self.train_dataset)))]
        inputs = self._prepare_inputs(self.data_collator(rows))
        tokens = inputs["input_ids"].numel()
        with torch.random.fork_rng():
            for _ in range(2):  # the first warms up
                began = time.perf_counter()
                with self.compute_loss_context_manager():
                    loss = (self.token_loss or PLAIN_LOSS)(self.model.train(), dict(inputs), tokens)
                loss.backward()
                self.model.zero_grad()
        return (time.perf_counter() - began) / tokens

    def drift(self) -> dict[str, dict[str, float]] | None:
        """Measure the drift from the base by text; None where it cannot be measured, as with OSF."""
        if self.reference is None:
            return None
        autocast = self.model.__dict__.pop("forward", None)  # accelerate's; the base was measured without
        try:
            with self.session.measuring():
                off = functools.partial(base_only, self.model)
                drifts = measure_drift(self.model, self.reference, off, may_be_nothing=True)
        except AdapterError as error:
            if self.record.settings.max_drift is not None:
                raise
            log.warning("the drift was not measured: %s", error)
            return None
        finally:
            if autocast is not None:
                self.model.forward = autocast
        return {name: drift.as_dict() for name, drift in drifts.items()}

    def carry_on(self, checkpoint: Path) -> None:
        """Train on from a checkpoint."""
        self.record.__dict__.update(json.loads((checkpoint / PROGRESS_FILE).read_text(encoding="utf-8")))
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step < self.args.max_steps:
            self.train(resume_from_checkpoint=str(checkpoint))
        else:  # stopped between the last step and the end; the Trainer would take one step more
            self.state = state
            self.session.load(checkpoint)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Return the mean loss per learned token over the held-out rows.

        Not the Trainer's eval_loss, which is a mean of batch means and repeats rows to fill the processes' last batch:
        every process measures all rows.
        """
        total, count, size = 0.0, 0, self.args.per_device_eval_batch_size
        with self.session.measuring(), eval_mode(self.model):
            for batch in DataLoader(self.eval_dataset, size, collate_fn=self.data_collator):
                inputs = self._prepare_inputs(batch)
                with self.compute_loss_context_manager():
                    total += float(PLAIN_LOSS(self.model, inputs, 1))
                count += int((inputs["labels"][:, 1:] != IGNORED).sum())
        return total / max(count, 1)

    def get_train_dataloader(self) -> DataLoader:
        """Return the Trainer's loader, unless the method has an order of its own."""
        batches = self.session.batches(RandomSampler(self.train_dataset), self.args.train_batch_size)
        if batches is None:
            return super().get_train_dataloader()
        data = self._remove_unused_columns(self.train_dataset, description="Training")
        return self.accelerator.prepare(DataLoader(data, batch_sampler=batches, collate_fn=self.data_collator))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no card with the checkpoints: the run writes its own at the end."""

    def _send_telemetry(self) -> None:
        """Send nothing: training needs no network."""

    # The Trainer saves and loads adapters by PEFT's defaults: that asks the hub whether the embeddings have changed,
    # and would prune AdaLoRA's ranks once more.

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        self.session.save(folder)
        progress = {name: getattr(self.record, name) for name in ("tokens", "seconds", "losses", "penalties")}
        write_atomic(folder / PROGRESS_FILE, json.dumps(progress))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.session.load(Path(resume_from_checkpoint))


class Record(TrainerCallback):
    """The record of a run, such that a resumed run goes on with the same numbers.

    A row of metrics.jsonl has `step`, `loss` (mean over the steps since the last row), each penalty's mean under its
    name, `lr`, `tokens` (read so far, without padding), `tokens_per_second` (since the last row), `seconds` (of
    training, over all sessions). Where it was measured it has `held_out_loss`, the row of step 0 little else. The rows
    are the Trainer's `log_history`, so `report_to` gets the same numbers, and TRL's besides.
    """

    trainer: AdapterTrainer

    def __init__(self, folder: Path, settings: TrainSettings, description: str):
        self.settings, self._folder, self._description = settings, folder, description
        self.tokens, self.seconds = 0, 0.0
        self.losses: list[float] = []  # of the steps since the last row
        self.penalties: dict[str, float] = {}  # sums over these steps
        self.interrupted = False  # the training is to end with a checkpoint after this step
        self.best: int | None = None  # the step whose checkpoint is the result, if it is not the last step
        self.why = ""

    @property
    def rows(self) -> list[Row]:
        """The rows so far."""
        rows = [row for row in self.trainer.state.log_history if "loss" in row or "held_out_loss" in row]
        return [{name: value for name, value in row.items() if name not in TRL_METRICS} for row in rows]

    def add(self, loss: Tensor, tokens: int) -> None:
        """Add a micro-batch: its share of the step's loss, and its tokens."""
        self._loss += loss.item()
        self._step_tokens += tokens
        self.micro_batch += 1

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Drop rows that were written after the checkpoint; measure the held-out loss before the first step."""
        if state.is_world_process_zero:
            write_atomic(self._folder / METRICS_FILE, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._bar = tqdm(
            desc=self._description,
            total=state.max_steps,
            initial=state.global_step,
            unit=" steps",
            disable=None if state.is_world_process_zero else True,
        )
        if self.trainer.eval_dataset is not None and not state.global_step:
            self.trainer.log({"held_out_loss": self.trainer.held_out_loss()})

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.micro_batch, self._loss, self._step_tokens, self._began = 0, 0.0, 0, time.perf_counter()

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Note the learning rate of the step, and let the method act."""
        self._lr = kwargs["optimizer"].param_groups[0]["lr"]
        step = state.global_step + 1
        self.trainer.session.after_step(step, step == state.max_steps)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Close the step; log a row if one is due. Raises DivergedError if the loss is not finite."""
        step, last, accelerator = state.global_step, state.global_step == state.max_steps, self.trainer.accelerator
        sums = torch.tensor([self._loss, self._step_tokens], dtype=torch.float64, device=accelerator.device)
        loss, tokens = accelerator.reduce(sums, "sum").tolist()
        loss /= accelerator.num_processes
        self.tokens += int(tokens)
        self.seconds += time.perf_counter() - self._began
        if not math.isfinite(loss):
            way = "lower train.lr, use train.dtype bf16 or fp32 instead of fp16, or look at the data of this step"
            raise DivergedError(f"the loss is {loss} at step {step}; {way}")
        self.losses.append(loss)
        self._bar.update(1)
        row: Row = self._row(state) if last or step % self.settings.log_every == 0 else {}
        every = self.settings.eval_every or max(state.max_steps // 10, 1)
        due = (self.settings.eval_every or self.settings.patience) and step % every == 0
        if (last or due) and self.trainer.eval_dataset is not None:
            row["held_out_loss"] = self.trainer.held_out_loss()
        if self.settings.max_drift is not None and (last or self.interrupted or step % every == 0):
            self._hold_drift(self.settings.max_drift, step, control)
        if row:
            self.trainer.log(row)
        ended = self.best is not None
        if self.settings.patience and "held_out_loss" in row and not ended:
            _, waited = self._lowest()
            ended = waited >= self.settings.patience and not last
            control.should_save = control.should_save or not waited
        if ended:  # without a checkpoint of this step, from which a run that is killed now would go on
            control.should_save, control.should_training_stop = False, True
        elif self.interrupted:
            control.should_save, control.should_training_stop = True, True

    def on_epoch_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Log the steps since the last row if the training ends before its last step."""
        if control.should_training_stop and self.losses and not self.interrupted:
            self.trainer.log(self._row(state))

    def _hold_drift(self, limit: float, step: int, control: Any) -> None:
        """Have a checkpoint written if the drift is small enough; else go back to the last one and end."""
        drift = max(text["kl"] for text in (self.trainer.drift() or {}).values())
        if drift <= limit:
            control.should_save = True
            return
        checkpoint = last_checkpoint(Path(str(self.trainer.args.output_dir)))
        if checkpoint is None:
            what = f"the drift is {drift:.2g} at step {step}, above train.max_drift {limit} when it is first measured"
            raise HipLoraError(f"{what}; lower train.lr, or measure more often with train.eval_every")
        self.trainer.session.load(checkpoint)
        self.best, self.why = int(checkpoint.name.rpartition("-")[2]), "stopped by train.max_drift"

    def _lowest(self) -> tuple[int | None, int]:
        """Return the step with the lowest held-out loss, for `patience`, and the number of measurements since."""
        rows = self.rows if self.settings.patience else []
        last = self.best or self.trainer.state.max_steps  # steps beyond `max_drift` do not count
        losses = [(row["held_out_loss"], row["step"]) for row in rows if "held_out_loss" in row]
        losses = [(loss, step) for loss, step in losses if 0 < step <= last]
        if not losses:
            return None, 0
        index = losses.index(min(losses))
        return losses[index][1], len(losses) - 1 - index

    def return_to_best(self) -> int:
        """With `patience`, load the adapter with the lowest held-out loss after the training; return its step."""
        done, (lowest, _) = self.best or self.trainer.state.global_step, self._lowest()
        if lowest is None or lowest == done:
            return done
        self.why = self.why or "train.patience: the held-out loss did not fall further"
        self.trainer.session.load(self._checkpoint(lowest))
        return lowest

    def _checkpoint(self, step: int) -> Path:
        return Path(str(self.trainer.args.output_dir)) / f"checkpoint-{step}"

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Complete a checkpoint with the hashes of its files; then remove the ones before it."""
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            folder, (lowest, _) = self._checkpoint(state.global_step), self._lowest()
            hashes = {path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.name != HASHES_FILE}
            write_atomic(folder / HASHES_FILE, json.dumps(hashes, indent=1))
            best = str(self._checkpoint(lowest)) if lowest else None
            rotate_checkpoints(str(args.output_dir), self.settings.keep_checkpoints, best_model_checkpoint=best)

    def _row(self, state: TrainerState) -> Row:
        """Return the row of the steps since the last one."""
        logged = (row for row in reversed(state.log_history) if "loss" in row and "tokens" in row)
        previous = next(logged, {"tokens": 0, "seconds": 0.0})
        speed = (self.tokens - previous["tokens"]) / max(self.seconds - previous["seconds"], 1e-9)
        row = {
            "loss": sum(self.losses) / len(self.losses),
            **{name: total / len(self.losses) for name, total in self.penalties.items()},
            "lr": self._lr,
            "tokens": self.tokens,
            "tokens_per_second": speed,
            "seconds": self.seconds,
        }
        if torch.cuda.is_available():
            row["reserved_bytes"] = torch.cuda.memory_reserved()
        self.losses, self.penalties = [], {}
        self._bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
        if self._bar.disable and state.is_world_process_zero:
            remaining = duration((state.max_steps - state.global_step) * self.seconds / state.global_step)
            step = f"step {state.global_step}/{state.max_steps}"
            log.info(
                "%s  loss %.4f  lr %.2e  %s tokens/s  %s left", step, row["loss"], self._lr, f"{speed:,.0f}", remaining
            )
        return row

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Append the row to the file."""
        new = state.log_history[-1]
        if state.is_world_process_zero and ("loss" in new or "held_out_loss" in new):
            with open(self._folder / METRICS_FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self._bar.close()


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a folder, if any; HipLoraError if a file of it is missing or changed."""
    if file := next((path for path in folder.glob("checkpoint-*") if path.is_file()), None):
        raise HipLoraError(f"{file}: is damaged, a file in a checkpoint's place; remove it, or pass --overwrite")
    for path in map(Path, reversed(sort_checkpoints(str(folder)))):
        try:
            hashes = json.loads((path / HASHES_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            log.warning("%s is not whole: its writing was cut off, or another version wrote it", path)
            continue
        except (ValueError, RecursionError):
            hashes = None
        if not isinstance(hashes, dict) or not hashes.keys() >= REQUIRED_FILES:
            hashes = {HASHES_FILE: ""}
        for name, expected in hashes.items():
            if not (path / name).is_file() or file_sha256(path / name) != expected:
                way = "remove it to carry on from the checkpoint before, or pass --overwrite"
                raise HipLoraError(f"{path}: {name} is missing or damaged; {way}")
        return path
    return None
