"""Edits one by one, in batches, or in batches one after the other, with what each stage did."""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from peft import PeftConfig
from torch import Tensor, nn

from hiplora.editing.alphaedit import AlphaEdit, AlphaEditor
from hiplora.editing.asking import BATCH_SIZE
from hiplora.editing.editors import Adapt, AdapterEditor, Editor, OnStep
from hiplora.editing.edits import Edit
from hiplora.editing.locality import LocalityOutcome, Reference, measure_locality
from hiplora.editing.measure import EditRecord, measure_edits, summarise
from hiplora.editing.train import EditTraining
from hiplora.errors import AdapterError, ConfigError
from hiplora.tuner import model_fingerprint

Mode = Literal["single", "batch", "sequential"]
MODES = ("single", "batch", "sequential")


@dataclass(frozen=True)
class EditSettings:
    """How a run edits and measures.

    `training` is how adapters are trained on a batch of edits (AlphaEdit has its own settings); `edits_per_batch` is
    for the modes with batches, None is all edits in one; `sample` is for the mode "single", how many edits to draw by
    the training's seed, None is all; `batch_size` is how many prompts are asked at once.
    """

    training: EditTraining = field(default_factory=lambda: EditTraining(steps=500))
    edits_per_batch: int | None = None
    sample: int | None = None
    batch_size: int = BATCH_SIZE

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        for name in ("edits_per_batch", "sample", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; expected at least 1")


@dataclass(frozen=True)
class EditStage:
    """One stage: the edits taught in it (by index), what that took, and what the model then says.

    `records` are of the edits that were taught by then and not taken back: in the mode "sequential" those of all stages
    so far, else those of this one. `locality` is None without a reference.
    """

    number: int
    taught: tuple[int, ...]
    took: Mapping[str, Any]
    records: tuple[EditRecord, ...]
    locality: LocalityOutcome | None = None

    @property
    def newest(self) -> tuple[EditRecord, ...]:
        """The records of the edits that were taught in this stage."""
        return tuple(record for record in self.records if record.index in self.taught)

    def as_dict(self, reference: Reference | None) -> dict[str, Any]:
        """Return the record for a JSON file, with its summaries."""
        found: dict[str, Any] = {
            "stage": self.number,
            "taught": list(self.taught),
            "took": dict(self.took),
            "newest": summarise(self.newest),
            "so_far": summarise(self.records),
            "records": [record.as_dict() for record in self.records],
        }
        if self.locality is not None and reference is not None:
            found["locality"] = {**self.locality.summary(reference), "items": asdict(self.locality)}
        return found


@dataclass(frozen=True)
class EditRun:
    """A whole run: the bare base's own outcome on the edits (`before`), the stages, the frozen reference, seconds."""

    mode: str
    method: str
    before: tuple[EditRecord, ...]
    stages: tuple[EditStage, ...]
    reference: Reference | None
    seconds: float

    @property
    def after(self) -> tuple[EditRecord, ...]:
        """What became of every edit: in the mode "sequential" after the last stage, else right after its own."""
        stages = self.stages[-1:] if self.mode == "sequential" else self.stages
        return tuple(record for stage in stages for record in stage.records)

    def summary(self) -> dict[str, Any]:
        """Return success before and after, in all and by category, and the locality (the mean over the stages).

        In the mode "sequential" the locality is that after the last stage.
        """
        found: dict[str, Any] = {"before": summarise(self.before), "after": summarise(self.after)}
        stages = self.stages[-1:] if self.mode == "sequential" else self.stages
        measured = [stage.locality for stage in stages if stage.locality is not None]
        if measured and self.reference is not None:
            parts = [outcome.summary(self.reference) for outcome in measured]
            found["locality"] = {key: sum(part[key] for part in parts) / len(parts) for key in parts[0]}
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return the record for a JSON file."""
        return {
            "mode": self.mode,
            "method": self.method,
            "seconds": self.seconds,
            "summary": self.summary(),
            "before": [record.as_dict() for record in self.before],
            "stages": [stage.as_dict(self.reference) for stage in self.stages],
            "reference": self.reference.as_dict() if self.reference else None,
        }


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
    on_stage: Callable[[EditStage], None] | None = None,
    on_edited: Callable[[int, Editor], None] | None = None,
    on_step: OnStep | None = None,
    done: Sequence[EditStage] = (),
    state: Mapping[str, Tensor] | None = None,
) -> EditRun:
    """Edit a bare model, measure after every stage, and leave the model behind bit for bit was.

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
        on_stage: is given each stage when it is measured, so that a long run's results can be kept.
        on_edited: is given a stage's number and its editor while its edits are in the model, to save them.
        on_step: is given the rows of `train_edits`; not with AlphaEdit.
        done: the first stages of an interrupted run; they are taken over. What comes is what would have come.
        state: `Editor.state` after the last of them; the mode "sequential" alone needs it.

    Raises:
        ConfigError: an unknown mode, a setting that this mode or method has no use for, or `done` of another run.
        AdapterError: `reference` is of another model, the loss is not finite, or the base cannot be restored.
        DataError: there are no edits, or AlphaEdit does not find an edit's subject in its prompt.
    """
    settings = settings or EditSettings()
    groups = edit_groups(len(edits), mode, settings)
    _check_reference(model, reference)
    _check_done(done, groups, needs_state=mode == "sequential" and state is None)
    began, size = time.perf_counter(), settings.batch_size
    wanted = {index: edits[index] for group in groups for index in group}
    before = measure_edits(model, tokenizer, wanted, size)
    editor: Editor = (
        AlphaEditor(model, tokenizer, method)
        if isinstance(method, AlphaEdit)
        else AdapterEditor(model, tokenizer, method, settings.training, on_step)
    )
    stages = list(done)
    try:
        if mode == "sequential" and state is not None:
            editor.restore(state)
        for number, group in enumerate(groups[len(done) :], start=len(done) + 1):
            if mode != "sequential" and stages:
                editor.reset()
            took = editor.teach([edits[index] for index in group])
            seen = [index for part in groups[:number] for index in part] if mode == "sequential" else group
            records = measure_edits(editor.model, tokenizer, {index: edits[index] for index in seen}, size)
            said = measure_locality(editor.model, tokenizer, reference) if reference else None
            stages.append(EditStage(number, tuple(group), took, tuple(records), said))
            if on_stage:
                on_stage(stages[-1])
            if on_edited:
                on_edited(number, editor)
    finally:
        editor.close()
    name = name or type(method).__name__
    return EditRun(mode, name, tuple(before), tuple(stages), reference, time.perf_counter() - began)


def edit_groups(count: int, mode: str, settings: EditSettings) -> list[list[int]]:
    """Return the indices of the edits that are taught together, group after group.

    Raises:
        ConfigError: there are no edits, an unknown mode, or a setting that it has no use for.
    """
    if mode not in MODES:
        raise ConfigError(f"mode is {mode!r}; expected one of {', '.join(MODES)}")
    if not count:
        raise ConfigError("there are no edits; give at least one")
    if mode != "single":
        if settings.sample is not None:
            raise ConfigError(f"sample is for the mode single; in the mode {mode} give fewer edits")
        size = settings.edits_per_batch or count
        return [list(range(first, min(first + size, count))) for first in range(0, count, size)]
    if settings.edits_per_batch is not None:
        raise ConfigError("edits_per_batch has no use in the mode single; use batch or sequential")
    chosen = list(range(count))
    if settings.sample is not None and settings.sample < count:
        chosen = sorted(random.Random(settings.training.seed).sample(chosen, settings.sample))
    return [[index] for index in chosen]


def _check_done(done: Sequence[EditStage], groups: Sequence[Sequence[int]], needs_state: bool) -> None:
    taught = [list(stage.taught) for stage in done]
    if taught != [list(group) for group in groups[: len(taught)]]:
        raise ConfigError(
            "the stages that are done taught other edits than this run's first ones; start anew"
        )
    if done and needs_state:
        raise ConfigError("a sequence of edits goes on from the editor's state; give it with the stages")


def _check_reference(model: nn.Module, reference: Reference | None) -> None:
    if reference is not None and reference.base != model_fingerprint(model):
        raise AdapterError(
            "the reference was frozen with other weights than the model has now; freeze it with the bare base model "
            "that is edited"
        )
