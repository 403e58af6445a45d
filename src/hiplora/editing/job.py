"""`hiplora edit`: edit facts in a model by one method, measure what that did, and write adapter, record and report."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass

from hiplora.editing.alphaedit import AlphaEdit, AlphaEditor, save_update
from hiplora.editing.editors import EditTraining, PositiveFloat
from hiplora.editing.edits import BUILT_IN, EditSet, Question, load_edits, load_questions
from hiplora.editing.measure import Reference
from hiplora.editing.run import EditRun, EditSettings, Mode, edit_groups, run_edits
from hiplora.errors import ConfigError, HipLoraError, first_problem
from hiplora.files import write_atomic
from hiplora.models import load, resolve
from hiplora.provenance import file_sha256, folder_identity, json_sha256, provenance
from hiplora.run_folder import RunFolder
from hiplora.training.adapt import put_on, save_trained
from hiplora.training.methods import METHODS, Method

ALPHAEDIT = "alphaedit"
RECORD, REPORT = "edit.json", "report.html"
# Steps and learning rate if none are given: the paper's for a batch, fewer and larger steps for one edit alone.
DEFAULT_STEPS = {"single": (20, 2e-3), "batch": (500, 2e-4), "sequential": (500, 2e-4)}
MEASURES = {
    "success": "success",
    "preferred": "new answer preferred",
    "exact": "new answer written",
    "paraphrase_success": "success on the paraphrase",
    "neighbours_kept": "questions near it kept",
}


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class EditJob:
    """What to edit and how. None is the default, which for steps and learning rate depends on the mode.

    `edits`, `limit` and `category` as in `load_edits`; `method` is a recipe's method or "alphaedit", `method_settings`
    its settings; `rows` are the edits of a training step; `edits_per_batch` and `sample` as in `EditSettings`;
    `questions` is how many unrelated questions measure the locality, 0 is none; `neighbours` asks the questions near
    each edit, if the file has some.
    """

    model: str
    edits: str
    method: str = "hiplora"
    method_settings: dict[str, Any] = field(default_factory=dict)
    mode: Mode = "batch"
    limit: PositiveInt | None = None
    category: str | None = None
    edits_per_batch: PositiveInt | None = None
    sample: PositiveInt | None = None
    steps: PositiveInt | None = None
    lr: PositiveFloat | None = None
    rows: PositiveInt | None = None
    questions: NonNegativeInt = 500
    neighbours: bool = True
    seed: Annotated[int, Field(ge=0)] = 42
    device: str = "cpu"


class PreparedEdits:
    """A job before a model is loaded: its method, settings, edits, and the unrelated questions to ask.

    Raises (on construction):
        ConfigError: a setting does not fit the method or the mode.
        DataError: the edits cannot be used.
    """

    def __init__(self, job: EditJob):
        self.job = job
        self.method = _method(job)
        steps, lr = DEFAULT_STEPS[job.mode]
        training = EditTraining(
            job.steps or steps, job.lr or lr, job.rows or EditTraining.batch_size, seed=job.seed
        )
        self.settings = EditSettings(training, job.edits_per_batch, job.sample)
        self.edits: EditSet = load_edits(
            job.edits, job.limit, neighbours=None if job.neighbours else 0, category=job.category
        )
        self.stages = len(edit_groups(len(self.edits), job.mode, self.settings))
        edited = {one.subject.casefold() for one in self.edits.edits}
        apart = [one for one in load_questions() if one.subject.casefold() not in edited]
        self.questions: list[Question] = apart[: job.questions]

    def run(self, model: Any, tokenizer: Any, folder: Path, **more: Any) -> EditRun:
        """Freeze what the bare base says, edit, measure, and leave the base as it was.

        Finished stages are kept in `folder`, and a run that was interrupted continues after them; `more` are further
        arguments of `run_edits`.
        """
        edits, job, method = self.edits.edits, self.job, self.method
        reference = Reference.freeze(model, tokenizer, self.questions, edits) if self.questions else None

        def adapt(model: Any) -> Any:
            return put_on(method, model, tokenizer, seed=job.seed, start=folder / "start")

        put_in = method if isinstance(method, AlphaEdit) else adapt
        return run_edits(
            *(model, tokenizer, put_in, edits, job.mode, self.settings, reference),
            name=job.method,
            folder=folder,
            **more,
        )

    def described(self) -> dict[str, Any]:
        """Return the edits' name, hashes and number, for the record."""
        source = self.job.edits
        built_in = source == BUILT_IN and not Path(source).exists()
        return {
            "name": self.edits.name if built_in else Path(source).name,
            "file_sha256": None if built_in else file_sha256(source),
            "edits_sha256": json_sha256([asdict(item) for item in self.edits.edits]),
            "count": len(self.edits),
        }


def edit(
    job: EditJob,
    out: str | Path,
    *,
    overwrite: bool = False,
    on_start: Callable[[str, int], Callable[[int], None]] | None = None,
) -> dict[str, Any]:
    """Do a job and return its record, which `out` gets as edit.json, with a report and the adapters beside it.

    A batch, and a sequence of batches, leave `adapter`; several batches apart leave `adapter-001` and so on; edits
    one by one leave none. AlphaEdit's update is written as a plain LoRA adapter. After an interruption the same job
    continues after the last batch that was finished. `on_start(what, total)` returns what is given each advance.

    Raises:
        ConfigError: a setting does not fit the method, the mode or the model, or `out` exists.
        DataError: the edits cannot be used.
        AdapterError: training diverged, or the base could not be restored.
    """
    prepared, out = PreparedEdits(job), Path(out)
    trained = not isinstance(prepared.method, AlphaEdit)
    total = prepared.stages * (prepared.settings.training.steps if trained else 1)
    plan = {
        "settings": asdict(job),
        "edits": prepared.described(),
        "model": folder_identity(resolve(job.model)),
    }
    folder, stages = RunFolder(out, "plan.json", RECORD), out / "stages"

    def edited(number: int, editor: Any) -> dict[str, Any]:
        if not trained:
            tick(1)
        if job.mode == "single" or (job.mode == "sequential" and number < prepared.stages):
            return {}
        name = f"adapter-{number:03d}" if job.mode == "batch" and prepared.stages > 1 else "adapter"
        if isinstance(editor, AlphaEditor):
            save_update(editor.updates(), out / name, job.model)
        else:
            save_trained(prepared.method, editor.model, out / name, stages / "start")
        return {"adapter": name}

    folder.check(plan, overwrite=overwrite)
    with folder.claimed(plan, overwrite=overwrite):
        try:
            model, tokenizer = load(job.model)
            tick = on_start("editing", total) if on_start else lambda _: None
            run = prepared.run(
                model.to(job.device), tokenizer, stages, on_edited=edited, on_step=lambda _: tick(1)
            )
        except HipLoraError:
            if not any(stages.glob("stage-*")):
                shutil.rmtree(out)
            raise
        record = {
            "schema": 2,
            "kind": "edit",
            "model": job.model,
            "method_settings": job.method_settings,
            "training": asdict(prepared.settings.training) if trained else None,
            "adapters": [stage.extra["adapter"] for stage in run.stages if "adapter" in stage.extra],
            "seconds": run.seconds,
            **run.as_dict(texts=True),
            "edits": prepared.described(),
            "provenance": provenance(seed=job.seed),
        }
        _write_report(out / REPORT, record)
        shutil.rmtree(stages)
        write_atomic(out / RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return record


def change_table(summary: Mapping[str, Any]) -> pd.DataFrame:
    """Return the shares of a summary in per cent, `before → after`: a row a measure, a column a group of edits."""
    before, after = summary["before"], summary["after"]
    rows = {"edits": {group: str(shares["edits"]) for group, shares in after.items()}}
    for key, title in MEASURES.items():
        if key in after["all"]:
            rows[title] = {
                group: f"{before[group][key]:.1f} → {shares[key]:.1f}" if key in shares else ""
                for group, shares in after.items()
            }
    return pd.DataFrame(rows).T


def locality_table(summary: Mapping[str, Any]) -> pd.DataFrame:
    """Return what became of the unrelated questions, a row a measure."""
    found = summary["locality"]
    return pd.DataFrame(
        {
            "questions": f"{found['questions']:.0f}",
            "accuracy (%)": f"{found['accuracy_before']:.1f} → {found['accuracy']:.1f}",
            "unchanged answers (%)": f"{found['unchanged']:.1f}",
            "log-probability of the true answers (nats)": f"{found['log_prob_change']:+.3f}",
            "log-probability of the edits' new answers (nats)": f"{found['edited_log_prob_change']:+.3f}",
        }.items(),
        columns=["unrelated questions", "value"],
    )


def _write_report(path: Path, record: Mapping[str, Any]) -> None:
    from hiplora.reporting import Section, plots, save_page

    summary = record["summary"]
    shown = [(key, title) for key, title in MEASURES.items() if key in summary["after"]["all"]]
    points = pd.DataFrame(
        [
            {"measure": title, "when": when, "share": summary[when]["all"][key]}
            for key, title in shown
            for when in ("before", "after")
        ]
    )
    figure = plots.bars(points, "share", "measure", group="when", xlabel="per cent of the edits")
    tables = {"Per cent of the edits, before → after": change_table(summary)}
    if "locality" in summary:
        tables["Unrelated questions"] = locality_table(summary).set_index("unrelated questions")
    title = f"{record['edits']['count']} edits by {record['method']}, {record['mode']}"
    section = Section("What became of the edits", tables=tables, figures={"All edits": figure})
    save_page(path, title, [section], subtitle=record["model"], provenance=record["provenance"])


def _method(job: EditJob) -> Method | AlphaEdit:
    if job.method == ALPHAEDIT:
        if given := [name for name in ("steps", "lr", "rows") if getattr(job, name) is not None]:
            raise ConfigError(
                f"{given[0]} has no use with alphaedit, which does not train; set value_steps and the like"
            )
        kind: Any = AlphaEdit
        settings = {"seed": job.seed, **job.method_settings}
    elif job.method in METHODS:
        kind, settings = METHODS[job.method], job.method_settings
    else:
        raise ConfigError(f"method is {job.method!r}; expected one of {', '.join([*METHODS, ALPHAEDIT])}")
    try:
        return kind(**settings)
    except ValidationError as error:
        raise ConfigError(
            f"--set {first_problem(error)}; docs/reference/recipes.md lists the settings"
        ) from error
