"""Edits one by one, in batches, or in batches one after the other, with what each stage did."""

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from peft import PeftConfig
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass
from safetensors.torch import load_file, save
from torch import nn

from hiplora.editing.alphaedit import AlphaEdit, AlphaEditor
from hiplora.editing.editors import Adapt, AdapterEditor, Editor, EditTraining, OnStep
from hiplora.editing.edits import Edit
from hiplora.editing.measure import (
    Reference,
    measure_edits,
    measure_locality,
    summarise,
    summarise_locality,
)
from hiplora.errors import AdapterError, ConfigError
from hiplora.files import write_atomic
from hiplora.tuner import model_fingerprint

Mode = Literal["single", "batch", "sequential"]
_VARYING = ("seconds", "tokens_per_second")  # of what a stage took: they differ from run to run


@dataclass(frozen=True)
class EditSettings:
    """How a run edits.

    `training` is how adapters are trained on a batch of edits (AlphaEdit has its own settings); `edits_per_batch` is
    for the modes with batches, None is all edits in one; `sample` is for the mode "single": how many edits to draw by
    the training's seed, None is all.
    """

    training: EditTraining = EditTraining(steps=500)
    edits_per_batch: PositiveInt | None = None
    sample: PositiveInt | None = None


@plain_dataclass(frozen=True)
class EditStage:
    """One stage: the edits taught in it (by index), what that took, and what the model then says.

    `records` (`measure_edits`) are for the edits in the model: in the mode "sequential" those of all stages so far,
    else those of this one. `locality` (`measure_locality`) is None without a reference; `extra` comes from `on_edited`.
    """

    number: int
    taught: list[int]
    took: Mapping[str, Any]
    records: pd.DataFrame
    locality: pd.DataFrame | None
    extra: Mapping[str, Any]

    def to_json(self) -> str:
        """Return the stage as text for `from_json`."""
        frames = {
            name: frame.to_dict("list")
            for name in ("records", "locality")
            if (frame := getattr(self, name)) is not None
        }
        return json.dumps(
            {"number": self.number, "taught": self.taught, "took": self.took, "extra": self.extra, **frames}
        )

    @classmethod
    def from_json(cls, text: str) -> "EditStage":
        """Read a stage back."""
        kept = json.loads(text)
        locality = pd.DataFrame(kept["locality"]) if "locality" in kept else None
        return cls(**{**kept, "records": pd.DataFrame(kept["records"]), "locality": locality})


@plain_dataclass(frozen=True)
class EditRun:
    """A whole run: what the bare base says about the edits (`before`), the stages, the reference, seconds."""

    mode: str
    method: str
    before: pd.DataFrame
    stages: list[EditStage]
    reference: Reference | None
    seconds: float

    @property
    def final(self) -> list[EditStage]:
        """The stages that count: in the mode "sequential" the last one, else all."""
        return self.stages[-1:] if self.mode == "sequential" else self.stages

    @property
    def after(self) -> pd.DataFrame:
        """What became of every edit."""
        return pd.concat([stage.records for stage in self.final], ignore_index=True)

    def summary(self) -> dict[str, Any]:
        """Return shares before and after, in all and by category, and the locality (the mean over the final stages)."""
        found: dict[str, Any] = {"before": summarise(self.before), "after": summarise(self.after)}
        if self.reference is not None:
            parts = [
                summarise_locality(self.reference, one.locality)
                for one in self.final
                if one.locality is not None
            ]
            found["locality"] = pd.DataFrame(parts).mean().to_dict()
        return found

    def as_dict(self, texts: bool = False) -> dict[str, Any]:
        """Return the results for JSON, without times; with `texts` also what the model wrote.

        `before` and each stage's `records` are columns with a value an edit (`measure_edits`); `stages` have further
        the indices `taught`, what that `took`, and the summaries `newest`, `so_far` and `locality`; `questions` are
        columns with a value an unrelated question: the frozen base's, and the mean over the final stages.
        """
        return {
            "mode": self.mode,
            "method": self.method,
            "edits": len(self.before),
            "summary": self.summary(),
            "before": _columns(self.before, texts),
            "stages": [self._stage(stage, texts) for stage in self.stages],
            "questions": self._questions(texts),
        }

    def _stage(self, stage: EditStage, texts: bool) -> dict[str, Any]:
        newest = stage.records[stage.records["index"].isin(stage.taught)]
        measured = self.reference is not None and stage.locality is not None
        return {
            "taught": stage.taught,
            "took": {key: value for key, value in stage.took.items() if key not in _VARYING},
            "newest": summarise(newest),
            "so_far": summarise(stage.records),
            "records": _columns(stage.records, texts),
            "locality": summarise_locality(self.reference, stage.locality) if measured else None,
        }

    def _questions(self, texts: bool) -> dict[str, list[Any]] | None:
        if self.reference is None:
            return None
        before = self.reference.answers.add_suffix("_before")
        after = sum(stage.locality.drop(columns="written") for stage in self.final) / len(self.final)
        columns = pd.concat([before, after], axis=1)
        if not texts:
            return columns.drop(columns="written_before").to_dict("list")
        asked = pd.DataFrame([asdict(question) for question in self.reference.questions])
        return pd.concat([asked, columns], axis=1).to_dict("list")


def run_edits(
    model: nn.Module,
    tokenizer: Any,
    method: PeftConfig | Adapt | AlphaEdit,
    edits: Sequence[Edit],
    mode: Mode,
    settings: EditSettings | None = None,
    reference: Reference | None = None,
    *,
    name: str = "",
    folder: Path | None = None,
    on_edited: Callable[[int, Editor], Mapping[str, Any] | None] | None = None,
    on_step: OnStep | None = None,
) -> EditRun:
    """Edit a bare model, measure after every stage, and leave the model behind bit for bit as it was.

    Modes: "single" teaches each edit alone and takes it back before the next; "batch" does so with batches of edits;
    "sequential" teaches batch after batch on top of each other, and measures the newest and all so far.

    Args:
        model: the bare base model, a causal language model.
        tokenizer: its tokenizer.
        method: a configuration of PEFT, a function that puts an adapter on the model, or AlphaEdit's settings.
        edits: what to teach.
        mode: as above.
        settings: training and batches; the defaults are the paper's 500 steps on all edits at once.
        reference: the base's answers to unrelated questions (`Reference.freeze`); None measures no locality.
        name: what to call the method in the record.
        folder: where to keep finished stages. A later call with the same arguments continues after them.
        on_edited: is given a stage's number and its editor while its edits are in the model; the stage keeps what it
            returns as `extra`.
        on_step: is given the rows of `train_edits`; not with AlphaEdit.

    Raises:
        ConfigError: a setting that this mode has no use for, or `folder` holds the stages of another run.
        AdapterError: `reference` is of another model, the loss is not finite, or the base cannot be restored.
        DataError: AlphaEdit does not find an edit's subject in its prompt.
    """
    settings, began = settings or EditSettings(), time.perf_counter()
    groups = edit_groups(len(edits), mode, settings)
    if reference is not None and reference.base != model_fingerprint(model):
        raise AdapterError(
            "the reference was frozen with other weights than the model has now; freeze it with the bare base model "
            "that is edited"
        )
    journal = _Journal(folder, mode == "sequential")
    stages = journal.stages
    if [stage.taught for stage in stages] != groups[: len(stages)]:
        raise ConfigError(
            f"{folder}: holds stages that taught other edits than this run; remove it to start anew"
        )
    before = measure_edits(model, tokenizer, {index: edits[index] for group in groups for index in group})
    if isinstance(method, AlphaEdit):
        editor: Editor = AlphaEditor(model, tokenizer, method)
    else:
        editor = AdapterEditor(model, tokenizer, method, settings.training, on_step)
    try:
        if mode == "sequential" and stages:
            editor.restore(journal.state())
        for number, group in enumerate(groups[len(stages) :], start=len(stages) + 1):
            if mode != "sequential" and stages:
                editor.reset()
            took = editor.teach([edits[index] for index in group])
            seen = [index for part in groups[:number] for index in part] if mode == "sequential" else group
            records = measure_edits(editor.model, tokenizer, {index: edits[index] for index in seen})
            said = measure_locality(editor.model, tokenizer, reference) if reference else None
            extra = on_edited(number, editor) if on_edited else None
            stages.append(EditStage(number, group, took, records, said, extra or {}))
            journal.keep(stages[-1], editor)
    finally:
        editor.close()
    name = name or type(method).__name__
    return EditRun(mode, name, before, stages, reference, time.perf_counter() - began)


def edit_groups(count: int, mode: str, settings: EditSettings) -> list[list[int]]:
    """Return the indices of the edits that are taught together, group after group.

    Raises:
        ConfigError: there are no edits, or a setting that the mode has no use for.
    """
    if not count:
        raise ConfigError("there are no edits; give at least one")
    if mode != "single":
        if settings.sample is not None:
            raise ConfigError(f"sample is for the mode single; in the mode {mode} give fewer edits")
        size = settings.edits_per_batch or count
        return [list(range(first, min(first + size, count))) for first in range(0, count, size)]
    if settings.edits_per_batch is not None:
        raise ConfigError("edits_per_batch has no use in the mode single; use batch or sequential")
    chosen = random.Random(settings.training.seed).sample(range(count), min(settings.sample or count, count))
    return [[index] for index in sorted(chosen)]


class _Journal:
    """The finished stages of a run on the disk, and in a sequence what the editor held after the last of them."""

    def __init__(self, folder: Path | None, sequential: bool):
        self._folder, self._sequential = folder, sequential
        kept = sorted(folder.glob("stage-*.json")) if folder else []
        self.stages = [EditStage.from_json(path.read_text(encoding="utf-8")) for path in kept]

    def state(self) -> dict[str, Any]:
        return load_file(self._state(len(self.stages)))

    def keep(self, stage: EditStage, editor: Editor) -> None:
        if self._folder is None:
            return
        if self._sequential:
            state = {name: tensor.contiguous().cpu() for name, tensor in editor.state().items()}
            write_atomic(self._state(stage.number), save(state))
        write_atomic(self._folder / f"stage-{stage.number:05d}.json", stage.to_json())
        self._state(stage.number - 1).unlink(missing_ok=True)

    def _state(self, number: int) -> Path:
        return self._folder / f"state-{number:05d}.safetensors"  # type: ignore[operator]


def _columns(records: pd.DataFrame, texts: bool) -> dict[str, list[Any] | None]:
    columns = records.to_dict("list")
    if not texts:
        del columns["written"], columns["paraphrase_written"]
    if not any(columns["neighbours_kept"]):
        columns["neighbours_kept"] = None
    return columns
