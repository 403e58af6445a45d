"""Edit facts in a model with one method, measure what that did, and write the adapter and the record."""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hiplora.editing.counterfact import BUILT_IN, load_edits
from hiplora.editing.edits import EditSet, Question, load_questions
from hiplora.errors import ConfigError
from hiplora.files import check_output_dir, staged_dir, write_atomic
from hiplora.provenance import file_sha256, json_sha256, provenance
from hiplora.recipes.methods import METHODS, LowRank, Spectral

if TYPE_CHECKING:
    from hiplora.editing import AlphaEdit, Editor, EditSettings, EditStage

ALPHAEDIT = "alphaedit"
RECORD = "edit.json"
# Steps and learning rate, where none are given: the paper's for a batch, fewer and larger steps for one edit alone.
DEFAULT_STEPS = {"single": (20, 2e-3), "batch": (500, 2e-4), "sequential": (500, 2e-4)}


@dataclass(frozen=True)
class EditJob:
    """What to edit and how. None is the default, which for steps and learning rate depends on the mode.

    `edits` is "builtin" or a file; `method` a recipe's method or "alphaedit", `method_settings` its settings; `rows`
    are the edits of a training step; `sample` is how many edits the mode "single" draws; `questions` is how many
    unrelated questions measure the locality, 0 is none.
    """

    model: str
    edits: str
    method: str = "hiplora"
    method_settings: Mapping[str, Any] = field(default_factory=dict)
    mode: str = "batch"
    limit: int | None = None
    edits_per_batch: int | None = None
    sample: int | None = None
    steps: int | None = None
    lr: float | None = None
    rows: int | None = None
    questions: int = 500
    seed: int = 42
    device: str = "cpu"


def edit(
    job: EditJob,
    out: str | Path,
    *,
    overwrite: bool = False,
    on_stage: "Callable[[EditStage, int], None] | None" = None,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Do a job and return its record, which `out` gets as edit.json, with the adapters beside it.

    A batch, and a sequence of batches, leave `adapter`; several batches apart leave `adapter-001` and so on; edits
    one by one leave none. AlphaEdit's update is written as a plain LoRA adapter. `on_stage` is given each stage and
    how many there are.

    Raises:
        ConfigError: a setting does not fit the method, the mode or the model, or `out` exists.
        DataError: the edits cannot be used.
        AdapterError: training diverged, or the base could not be restored.
    """
    check_output_dir(out, overwrite)
    method = _method(job)
    settings, training = _settings(job)
    edits = load_edits(job.edits, job.limit)
    questions = _questions(edits, job.questions)
    from hiplora.editing import Reference, run_edits
    from hiplora.editing.run import edit_groups

    stages = len(edit_groups(len(edits), job.mode, settings))
    from hiplora.models import load

    model, tokenizer = load(job.model)
    model.to(job.device)
    reference = Reference.freeze(model, tokenizer, questions, edits.edits) if questions else None
    with staged_dir(out, overwrite) as staged, tempfile.TemporaryDirectory() as aside:
        put_on = _adapt(method, tokenizer, job.seed, Path(aside)) if isinstance(method, LowRank) else method
        saver = _Saver(job, stages, staged, Path(aside))
        run = run_edits(
            model,
            tokenizer,
            put_on,
            edits.edits,
            cast(Any, job.mode),
            settings,
            reference,
            name=job.method,
            on_stage=(lambda stage: on_stage(stage, stages)) if on_stage else None,
            on_edited=saver,
            on_step=on_step,
        )
        record = {
            "schema": 1,
            "kind": "edit",
            "model": job.model,
            "edits": _described(job.edits, edits),
            "method_settings": method.model_dump(mode="json")
            if isinstance(method, LowRank)
            else asdict(method),
            "training": training,
            "adapters": saver.written,
            **run.as_dict(),
            "provenance": provenance(seed=job.seed),
        }
        write_atomic(staged / RECORD, _json(record))
    return record


def _method(job: EditJob) -> "LowRank | AlphaEdit":
    if job.method == ALPHAEDIT:
        from hiplora.editing.alphaedit import AlphaEdit

        given = [name for name in ("steps", "lr", "rows") if getattr(job, name) is not None]
        if given:
            raise ConfigError(
                f"{given[0]} has no use with alphaedit, which does not train; set value_steps and the like"
            )
        return _built(AlphaEdit, {"seed": job.seed, **job.method_settings})
    if job.method not in METHODS:
        raise ConfigError(f"method is {job.method!r}; expected one of {', '.join([*METHODS, ALPHAEDIT])}")
    return _built(METHODS[job.method], dict(job.method_settings))


def _built(kind: Any, settings: Mapping[str, Any]) -> Any:
    """Make a method of its settings; what is wrong with them is said in one line."""
    from pydantic import ValidationError

    try:
        if isinstance(kind, type) and issubclass(kind, LowRank):
            return kind.model_validate(settings)
        fields = kind.__dataclass_fields__
        unknown = next((name for name in settings if name not in fields), None)
        if unknown is not None:
            raise ConfigError(f"alphaedit has no setting {unknown!r}; expected one of {', '.join(fields)}")
        as_tuple = {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}
        return kind(**as_tuple)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"][:1]))
        raise ConfigError(
            f"--set {name}: {first['msg']}, found {first.get('input')!r}; docs/training.md lists the settings"
        ) from error


def _settings(job: EditJob) -> "tuple[EditSettings, dict[str, Any] | None]":
    from hiplora.editing import EditSettings, EditTraining

    if job.mode not in DEFAULT_STEPS:
        raise ConfigError(f"mode is {job.mode!r}; expected one of {', '.join(DEFAULT_STEPS)}")
    steps, lr = DEFAULT_STEPS[job.mode]
    training = EditTraining(
        steps=steps if job.steps is None else job.steps,
        lr=lr if job.lr is None else job.lr,
        batch_size=EditTraining.batch_size if job.rows is None else job.rows,
        seed=job.seed,
    )
    settings = EditSettings(training, job.edits_per_batch, job.sample)
    return settings, None if job.method == ALPHAEDIT else asdict(training)


def _questions(edits: EditSet, count: int) -> list[Question]:
    """The first built-in questions whose subjects are not edited."""
    edited = {item.subject.casefold() for item in edits.edits}
    return [item for item in load_questions() if item.subject.casefold() not in edited][:count]


def _adapt(method: LowRank, tokenizer: Any, seed: int, aside: Path) -> Callable[[Any], Any]:
    """A function that puts the adapter of a recipe's method on a bare model, calibrated if it needs that."""

    def adapt(model: Any) -> Any:
        import torch
        from peft import get_peft_model

        from hiplora.training.adapters import adapter_config, is_pissa, save_start
        from hiplora.training.calibration import calibrate_for
        from hiplora.tuner import HipLoraConfig

        config = adapter_config(method)
        try:
            if isinstance(config, HipLoraConfig) and config.basis == "activation":
                calibrate_for(cast(Spectral, method), config, model, tokenizer)
            torch.manual_seed(seed)
            adapted = get_peft_model(model, config)
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"method {method.name} does not fit the model: {error}; set target_modules"  # type: ignore[attr-defined]
            ) from error
        if is_pissa(method):
            save_start(adapted, aside / "start")
        return adapted

    return adapt


class _Saver:
    """Writes the edits that are in the model at the end of a stage, where they will not be in it later."""

    def __init__(self, job: EditJob, stages: int, folder: Path, aside: Path):
        self.written: list[str] = []
        self._job, self._stages, self._folder, self._aside = job, stages, folder, aside

    def __call__(self, number: int, editor: "Editor") -> None:
        if self._job.mode == "single" or (self._job.mode == "sequential" and number < self._stages):
            return
        several = self._job.mode == "batch" and self._stages > 1
        name = f"adapter-{number:03d}" if several else "adapter"
        self._save(editor, self._folder / name)
        self.written.append(name)

    def _save(self, editor: Any, folder: Path) -> None:
        from hiplora.editing.alphaedit import AlphaEditor, save_update
        from hiplora.training.adapters import save_adapter, save_difference

        start = self._aside / "start"
        if isinstance(editor, AlphaEditor):
            save_update(editor.updates(), folder, self._job.model)
        elif start.is_dir():
            save_difference(editor.model, folder, start)
        else:
            save_adapter(editor.model, folder)


def _described(source: str, edits: EditSet) -> dict[str, Any]:
    built_in = source == BUILT_IN and not Path(source).exists()
    digest = json_sha256([asdict(item) for item in edits.edits])
    return {
        "name": edits.name if built_in else Path(source).name,
        "file_sha256": None if built_in else file_sha256(source),
        "edits_sha256": digest,
        "count": len(edits),
    }


def _json(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"
