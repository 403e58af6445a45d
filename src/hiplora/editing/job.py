"""Edit facts in a model by one method, together, apart or one after the other, and measure what each stage did."""

import functools
import itertools
import json
import random
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from peft import PeftConfig
from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hiplora.editing import measure
from hiplora.editing.alphaedit import AlphaEdit, AlphaEditor
from hiplora.editing.crispedit import CrispEdit, CrispEditor
from hiplora.editing.editors import (
    Adapt,
    AdapterEditor,
    Editor,
    EditTraining,
    PositiveFloat,
    WeightEditor,
    WeightEdits,
)
from hiplora.editing.edits import BUILT_IN, Category, Edit, Question, load_edits, load_questions
from hiplora.errors import ConfigError, first_line, first_problem
from hiplora.evaluation.mounting import load_model
from hiplora.files import staged_dir, write_atomic
from hiplora.models import hub_name
from hiplora.provenance import json_sha256, provenance
from hiplora.run_folder import RunFolder
from hiplora.training.adapt import put_on, save_trained
from hiplora.training.baselines import METHODS
from hiplora.training.method import Method
from hiplora.training.result import OWN_FORMAT

EDITORS: dict[str, type[WeightEdits]] = {"alphaedit": AlphaEdit, "crispedit": CrispEdit}
# Steps and learning rate if none are given: the paper's for a batch, fewer and larger steps for one edit alone.
DEFAULT_STEPS = {"single": (20, 2e-3), "batch": (500, 2e-4), "sequential": (500, 2e-4)}
CARD = """---
base_model: {base}
library_name: peft
tags: [peft, hiplora]
---

# Edited facts in {base}

{count} facts, edited by `hiplora edit` with {title}, {mode}; `edit.json` beside this folder has all of them. {loading}
"""
Values = dict[str, Any]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class EditJob:
    """What to edit and how. None is the default; those of steps and learning rate depend on the mode.

    `edits`, `limit` and `category` as in `load_edits`; `method` is a recipe's method, "alphaedit" or "crispedit",
    `method_settings` its settings; `mode` is "batch" (batches of `edits_per_batch` apart from each other; None is all
    in one), "sequential" (batch after batch on top of each other) or "single" (each edit alone; `sample` draws so
    many); `rows` are the edits of a training step; `questions` is how many unrelated questions measure the locality;
    `neighbours` asks the questions near each edit, if the file has some. The properties raise ConfigError or DataError
    for settings and edits that cannot be used.
    """

    model: str
    edits: str = BUILT_IN
    method: str = "hiplora"
    method_settings: dict[str, Any] = field(default_factory=dict)
    mode: Literal["single", "batch", "sequential"] = "batch"
    limit: PositiveInt | None = None
    category: Category | None = None
    edits_per_batch: PositiveInt | None = None
    sample: PositiveInt | None = None
    steps: PositiveInt | None = None
    lr: PositiveFloat | None = None
    rows: PositiveInt | None = None
    questions: NonNegativeInt = 500
    neighbours: bool = True
    seed: Annotated[int, Field(ge=0)] = 42
    device: str = "auto"

    @functools.cached_property
    def chosen_method(self) -> Method | WeightEdits:
        """The method with its settings."""
        kind: Any = EDITORS.get(self.method) or METHODS.get(self.method)
        if kind is None:
            raise ConfigError(f"method is {self.method!r}; expected one of {', '.join([*METHODS, *EDITORS])}")
        of_training = [name for name in ("steps", "lr", "rows") if getattr(self, name) is not None]
        if kind is AlphaEdit and of_training:
            raise ConfigError(
                f"{of_training[0]} has no use with alphaedit, which does not train; set value_steps and the like"
            )
        try:
            seed = {"seed": self.seed} if self.method in EDITORS else {}
            return kind(**seed | self.method_settings)
        except ValidationError as error:
            raise ConfigError(f"--set {first_problem(error)}; docs/reference/recipes.md lists the settings") from error

    @functools.cached_property
    def training(self) -> EditTraining:
        """How an adapter is trained on a group."""
        steps, lr = DEFAULT_STEPS[self.mode]
        rows = self.rows or EditTraining.batch_size
        return EditTraining(self.steps or steps, self.lr or lr, rows, seed=self.seed)

    @functools.cached_property
    def facts(self) -> list[Edit]:
        """The edits."""
        edits = load_edits(self.edits, self.limit, category=self.category)
        return edits if self.neighbours else [replace(edit, neighbours=()) for edit in edits]

    @functools.cached_property
    def groups(self) -> list[list[int]]:
        """Indices of the edits that are taught together."""
        count = len(self.facts)
        if self.mode != "single":
            if self.sample is not None:
                raise ConfigError(f"sample is for the mode single; in the mode {self.mode} give fewer edits")
            return edit_groups(count, self.edits_per_batch)
        if self.edits_per_batch is not None:
            raise ConfigError("edits_per_batch has no use in the mode single; use batch or sequential")
        chosen = random.Random(self.seed).sample(range(count), min(self.sample or count, count))
        return [[index] for index in sorted(chosen)]

    def run(self, model: Any, tokenizer: Any, start: Path | None = None, **more: Any) -> Values:
        """Edit a bare model, measure, and leave it as it was; `start` as in `put_on`, `more` as in `run_edits`."""
        method: Any = self.chosen_method
        if not isinstance(method, WeightEdits):
            method = functools.partial(put_on, method, tokenizer=tokenizer, seed=self.seed, start=start)
        edited = {edit.subject.casefold() for edit in self.facts}
        unrelated = [question for question in load_questions() if question.subject.casefold() not in edited]
        more |= {"groups": self.groups, "sequential": self.mode == "sequential"}
        record = run_edits(model, tokenizer, method, self.facts, self.training, unrelated[: self.questions], **more)
        return {"mode": self.mode, "method": self.method, **record}


def edit(job: EditJob, out: str | Path, *, overwrite: bool = False) -> Values:
    """Run a job and return its record, which is written to `out` as edit.json, beside the adapters and report.html.

    A batch, and a sequence of batches, leave `adapter`; several separate batches leave `adapter-001` and so on; single
    edits leave none. An interrupted job goes on after the last finished batch. ConfigError if a setting does not fit
    the method, the mode or the model, or `out` cannot be used; DataError if the edits cannot; AdapterError if training
    diverged, or the base could not be restored.
    """
    from hiplora.editing.report import verdict, write_report  # a missing library is reported before the work begins

    method, batches = job.chosen_method, len(job.groups)
    settings = {**asdict(job), "edits_sha256": json_sha256([asdict(edit) for edit in job.facts])}
    run = RunFolder(Path(out), "settings.json", "edit.json")
    run.check(settings, overwrite=overwrite, inputs={"the model": job.model, "the edits": job.edits})
    model, tokenizer = load_model(job.model, job.device)
    start, several = run.path / "stages" / "start", job.mode == "batch" and batches > 1

    def save(number: int, editor: Editor) -> None:
        if job.mode == "single" or (job.mode == "sequential" and number < batches):
            return
        with staged_dir(run.path / (f"adapter-{number:03d}" if several else "adapter"), overwrite=True) as folder:
            if isinstance(editor, WeightEditor):
                editor.save(folder, job.model)
            else:
                save_trained(method, editor.model, folder, start)  # type: ignore[arg-type]
            loading = f"This is {method.kind}; stock PEFT loads it without hiplora." if method.kind else OWN_FORMAT
            card = CARD.format(
                base=hub_name(job.model), count=len(job.facts), title=method.title, mode=job.mode, loading=loading
            )
            (folder / "README.md").write_text(card, encoding="utf-8")

    with run.claimed(settings, overwrite=overwrite):
        measured = job.run(model, tokenizer, start, on_edited=save, folder=run, progress=True)
        record = {
            "schema": 3,
            "kind": "edit",
            "settings": asdict(job),
            "training": None if isinstance(method, AlphaEdit) else asdict(job.training),
            "edits_sha256": settings["edits_sha256"],
            "adapters": sorted(path.name for path in run.path.glob("adapter*")),
            **measured,
            "provenance": provenance(seed=job.seed),
        }
        record["verdict"] = verdict(record)
        write_report(run.path / "report.html", record, job.facts)
        write_atomic(run.path / "edit.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        shutil.rmtree(run.path / "stages")
    return record


def run_edits(
    model: nn.Module,
    tokenizer: Any,
    method: PeftConfig | Adapt | AlphaEdit | CrispEdit,
    edits: Sequence[Edit],
    training: EditTraining | None = None,
    questions: Sequence[Question] = (),
    *,
    groups: Sequence[Sequence[int]] | None = None,
    sequential: bool = False,
    on_edited: Callable[[int, Editor], None] | None = None,
    folder: RunFolder | None = None,
    progress: bool = False,
) -> Values:
    """Edit a bare model group after group, measure after each, and leave it bit for bit as it was.

    `method` is a configuration of PEFT, a function that puts an adapter on the model, or the settings of AlphaEdit or
    CrispEdit; all but AlphaEdit are trained by `training` (the paper's 500 steps). `questions` are unrelated ones that
    measure the locality. `groups` are the indices of the edits that are taught together (None: all), each taken back
    before the next or, if `sequential`, one on top of the other. `on_edited` gets a group's number, from 1, and the
    editor while its edits are in the model; `folder` keeps the finished groups, so that the same call goes on where it
    was interrupted.

    Returns a record for JSON: `edits`, their number; `summary` (`before`, `after`, and with questions `locality`); what
    the bare base says about the edits (`before`: columns with a value an edit, as of `measure_edits`); `stages`, each
    with the indices `taught`, what that `took`, such `records` of the edits in the model, and summaries; `questions`,
    columns with a value an unrelated question, before and after; `seconds` of teaching.

    AdapterError if the loss is not finite, or the base cannot be restored; DataError if the edits do not fit
    into the model's context, or AlphaEdit does not find an edit's subject in its prompt.
    """
    groups = groups or [range(len(edits))]
    measure.check_lengths(model, tokenizer, edits)
    targets = measure.unrelated_targets(questions, edits)
    keep: Callable[[str, Callable[[], Values]], Values] = folder.stage if folder else lambda _, work: work()
    training = training or EditTraining(steps=500)
    if isinstance(method, AlphaEdit):
        editor: Editor = AlphaEditor(model, tokenizer, method)
    elif isinstance(method, CrispEdit):
        editor = CrispEditor(model, tokenizer, method, training, progress)
    else:
        editor = AdapterEditor(model, tokenizer, method, training, progress)

    def measured(edits: Sequence[Edit], indices: Iterable[int]) -> Values:
        records = measure.measure_edits(editor.model, tokenizer, {index: edits[index] for index in indices})
        answers = measure.ask(editor.model, tokenizer, questions, targets)
        return {"records": _columns(records), "answers": _columns(answers)}

    def bare() -> Values:
        with editor.off():
            answered = measure.with_old_answers(editor.model, tokenizer, edits)
            return {"old": [edit.old for edit in answered], **measured(answered, itertools.chain(*groups))}

    def teach(number: int) -> Values:
        if not sequential:
            editor.restore({})
        elif folder and number > 1:
            editor.restore(_stored_state(folder, number - 1))
        took = editor.teach([answered[index] for index in groups[number - 1]])
        taught = itertools.chain(*groups[0 if sequential else number - 1 : number])
        stage = {"took": took, **measured(answered, taught)}
        if on_edited:
            on_edited(number, editor)
        if folder and sequential:
            state = {name: tensor.contiguous() for name, tensor in editor.state().items()}
            save_file(state, _state_file(folder, number))
        return stage

    stages: list[Values] = []
    try:
        before = keep("bare", bare)
        answered = [replace(edit, old=old) for edit, old in zip(edits, before["old"], strict=True)]
        for number in range(1, len(groups) + 1):
            stages.append(keep(f"group-{number:03d}", functools.partial(teach, number)))
            if folder:
                _state_file(folder, number - 1).unlink(missing_ok=True)
    finally:
        editor.close()
    return _record(before, stages, groups, questions, sequential)


def edit_groups(count: int, size: int | None = None) -> list[list[int]]:
    """Return the indices of so many edits in groups of `size`; None is all in one."""
    size = size or count
    return [list(range(first, min(first + size, count))) for first in range(0, count, size)]


def _stored_state(folder: RunFolder, number: int) -> dict[str, Tensor]:
    """Return the editor's state after so many groups of a sequence; ConfigError if its file is missing or damaged."""
    try:
        return load_file(_state_file(folder, number))
    except (OSError, SafetensorError) as error:
        what = f"--out {folder.path}: cannot be carried on after batch {number} ({first_line(error)})"
        raise ConfigError(f"{what}; pass --overwrite to start anew") from error


def _state_file(folder: RunFolder, number: int) -> Path:
    """Return the file with the editor's state after so many groups of a sequence."""
    return folder.path / "stages" / f"group-{number:03d}.safetensors"


def _columns(table: pd.DataFrame) -> Values:
    columns = table.astype(object).where(table.notna(), None).to_dict("list")
    if not any(columns.get("neighbours_kept", [True])):
        columns["neighbours_kept"] = None
    return columns


def _record(
    before: Values,
    stages: Sequence[Values],
    groups: Sequence[Sequence[int]],
    questions: Sequence[Question],
    sequential: bool,
) -> Values:
    """Return the record of a run, with summaries of its stages."""
    bare, bare_answers = (pd.DataFrame(before[name]) for name in ("records", "answers"))
    records, answers = ([pd.DataFrame(stage[name]) for stage in stages] for name in ("records", "answers"))
    summaries = [
        {
            "taught": list(group),
            "took": {name: value for name, value in stage["took"].items() if name != "seconds"},
            "newest": measure.summarise(so_far[so_far["index"].isin(group)]),
            "so_far": measure.summarise(so_far),
            "records": stage["records"],
            "locality": measure.summarise_locality(bare_answers, after) if questions else None,
        }
        for group, stage, so_far, after in zip(groups, stages, records, answers, strict=True)
    ]
    last = slice(-1, None) if sequential else slice(None)  # the last stage of a sequence has all edits
    after = measure.summarise(pd.concat(records[last], ignore_index=True))
    summary: Values = {"before": measure.summarise(bare), "after": after}
    columns = None
    if questions:
        summary["locality"] = pd.DataFrame([stage["locality"] for stage in summaries[last]]).mean().to_dict()
        numbers = [
            table.assign(written=table["written"] == bare_answers["written"]).astype(float) for table in answers[last]
        ]
        mean = (sum(numbers) / len(numbers)).rename(columns={"written": "unchanged"})
        parts = [pd.DataFrame(map(asdict, questions)), bare_answers.add_suffix("_before"), mean]
        columns = pd.concat(parts, axis=1).to_dict("list")
    return {
        "edits": len(bare),
        "summary": summary,
        "before": before["records"],
        "stages": summaries,
        "questions": columns,
        "seconds": sum(stage["took"]["seconds"] for stage in stages),
    }
