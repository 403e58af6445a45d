"""TRL's SFTTrainer with four things of its own: whole checkpoints, logits only where something is learned,
a record that a resumed run continues exactly, and no network.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer

from hiplora.training.adapters import ADAPTER, save_adapter
from hiplora.training.checkpoints import prune, staged
from hiplora.training.encoding import IGNORED
from hiplora.training.memory import peak_bytes, reserved_bytes
from hiplora.training.metrics import Record
from hiplora.training.penalties import Penalty

LOGITS_LIMIT = 2**29  # logits of one batch kept at a time (2 GiB in fp32); beyond it, TRL's chunked loss


class RecordingTrainer(SFTTrainer):
    """An SFTTrainer that keeps a `Record` and measures the held-out loss; its checkpoints are whole or absent.

    Penalties are added once a step, in equal shares on its first `turns` passes.
    """

    turns = 1

    def __init__(
        self,
        *args: Any,
        record: Record,
        checkpoints: Path,
        keep_checkpoints: int = 1,
        eval_every: int | None = None,
        penalties: Sequence[Penalty] = (),
        **kwargs: Any,
    ) -> None:
        """Take SFTTrainer's arguments, the record, the checkpoints' folder, how often to measure, and what to add."""
        self.record = record
        self._penalties = [penalty for penalty in penalties if penalty.weight]
        self._passes = 0  # of the current optimizer step
        self._checkpoints = checkpoints
        self._keep_checkpoints = keep_checkpoints
        self._aside: Path | None = None
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        self.add_callback(_Recorder(self, eval_every))

    @property
    def adapted(self) -> Any:
        """The model with its adapter, a PeftModel (the Trainer itself does not say so)."""
        return self.model

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Begin an optimizer step."""
        self._passes = 0
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Train on one batch and record its share of the step's loss; the step's first passes have the penalties."""
        tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.record.add_batch(loss.item(), int(tokens))
        if self._passes < self.turns:
            self._penalise()
        self._passes += 1
        return loss

    def _penalise(self) -> None:
        for penalty in self._penalties:
            with self.compute_loss_context_manager():
                value = penalty(self.adapted, self.state.global_step)
            self.accelerator.backward(penalty.weight / self.turns * value)
            self.record.add_penalty(penalty.name, value.item() / self.turns)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross-entropy over the learned tokens; the language-model head runs only where some row learns.

        TRL does the same on a GPU; on a CPU its chunked kernel scores every position, most of which are prompts.
        """
        labels = inputs["labels"]
        learned = F.pad(labels[:, 1:] != IGNORED, (0, 1))  # (rows, tokens): the next token is learned
        columns = learned.any(dim=0).nonzero().flatten()  # a mask of two dimensions is news to most models
        vocabulary = self.adapted.get_output_embeddings().weight.shape[0]
        many = len(learned) * len(columns) * vocabulary > LOGITS_LIMIT
        if return_outputs or labels.device.type != "cpu" or many or self.aux_loss_enabled:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        known = {name: value for name, value in inputs.items() if name != "labels"}
        logits = model(**known, use_cache=False, logits_to_keep=columns).logits[learned[:, columns]]
        loss = F.cross_entropy(logits.float(), labels[:, 1:][learned[:, :-1]], reduction="sum")
        count = learned.sum() if num_items_in_batch is None else num_items_in_batch
        return loss / torch.as_tensor(count).clamp(min=1)

    def take_adapter(self, checkpoint: Path) -> None:
        """Give the model the adapter of a checkpoint."""
        self.adapted.load_adapter(str(checkpoint), ADAPTER, is_trainable=True)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Return the mean loss per learned token over the held-out rows."""
        training = self.adapted.training
        self.adapted.eval()
        total, count = 0.0, 0
        try:
            for batch in self.get_eval_dataloader():
                inputs = self._prepare_inputs(batch)
                with self.compute_loss_context_manager():
                    total += float(self.compute_loss(self.model_wrapped, inputs, num_items_in_batch=1))
                count += int((inputs["labels"][:, 1:] != IGNORED).sum())
        finally:
            self.adapted.train(training)
        return total / max(count, 1)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no card: the run writes its own at the end."""

    def _send_telemetry(self) -> None:
        """Nothing goes over the network."""

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside or self._checkpoints)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        save_adapter(self.adapted, Path(output_dir or self._get_output_dir(None)))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Let the trainer write into a folder aside; rename it when it is whole."""
        self.record.peak_memory = max(self.record.peak_memory, peak_bytes())
        with staged(self._checkpoints / f"step-{self.state.global_step}") as aside:
            self._aside = aside
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._aside = None
            (written,) = aside.iterdir()
            for path in list(written.iterdir()):
                path.rename(aside / path.name)
            written.rmdir()
            self.record.save(aside)
        prune(self._checkpoints, self._keep_checkpoints)


class _Recorder(TrainerCallback):
    """Tell the record when a step is over, and measure when it is time."""

    def __init__(self, trainer: RecordingTrainer, eval_every: int | None) -> None:
        self._trainer = trainer
        self._eval_every = eval_every
        self._lr = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trainer.eval_dataset is not None and not self._trainer.record.rows and not state.global_step:
            row = {"step": 0, "held_out_loss": self._trainer.held_out_loss()}
            self._trainer.record.write(row)
        self._trainer.record.restart_clock()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._lr = kwargs["optimizer"].param_groups[0]["lr"]

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        record, step = self._trainer.record, state.global_step
        row = record.end_step(step, self._lr)
        due = step == state.max_steps or (self._eval_every is not None and step % self._eval_every == 0)
        if due and self._trainer.eval_dataset is not None:
            row = {**(row or {"step": step}), "held_out_loss": self._trainer.held_out_loss()}
        if row is not None:
            record.write(row if (held := reserved_bytes()) is None else {**row, "reserved_bytes": held})
        record.restart_clock()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.record.restart_clock()
