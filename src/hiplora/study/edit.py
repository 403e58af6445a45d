"""Edit facts in a model with one method, measure what that did, and write the adapter and the record."""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hiplora.files import check_output_dir, staged_dir, write_atomic
from hiplora.provenance import provenance
from hiplora.study.edit_job import EditJob, PreparedEdits
from hiplora.training.method import Method

if TYPE_CHECKING:
    from hiplora.editing import Editor, EditStage

RECORD = "edit.json"


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
    prepared = PreparedEdits.of(job)
    stages, method = prepared.stages, prepared.method
    from hiplora.models import load

    model, tokenizer = load(job.model)
    model.to(job.device)
    with staged_dir(out, overwrite) as staged, tempfile.TemporaryDirectory() as aside:
        saver = _Saver(job, stages, staged, Path(aside))
        run = prepared.run(
            model,
            tokenizer,
            Path(aside),
            on_stage=(lambda stage: on_stage(stage, stages)) if on_stage else None,
            on_edited=saver,
            on_step=on_step,
        )
        record = {
            "schema": 1,
            "kind": "edit",
            "model": job.model,
            "edits": prepared.described(),
            "method_settings": method.model_dump(mode="json")
            if isinstance(method, Method)
            else asdict(method),
            "training": prepared.training,
            "adapters": saver.written,
            **run.as_dict(),
            "provenance": provenance(seed=job.seed),
        }
        write_atomic(staged / RECORD, _json(record))
    return record


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
        from hiplora.training.method import save_adapter
        from hiplora.training.residual_init import save_difference

        start = self._aside / "start"
        if isinstance(editor, AlphaEditor):
            save_update(editor.updates(), folder, self._job.model)
        elif start.is_dir():
            save_difference(editor.model, folder, start)
        else:
            save_adapter(editor.model, folder)


def _json(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"
