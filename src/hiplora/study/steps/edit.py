"""Edit facts in the base by a method, measure what that did, and take them out again.

Settings: `method`, a method of a recipe or {name: alphaedit, …its settings}; `edits`, "builtin" or a file of the
study; `limit`, `category`, `mode`, `edits_per_batch`, `sample`, `steps`, `lr`, `rows`, `questions`, `seed` as of
`EditJob`, None its default; `neighbours`, whether the questions near each edit are asked; `drift` as of `evaluate`,
measured after the last edit (no use one by one); `files`, hashes of what is read.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hiplora.editing import Editor
from hiplora.editing.counterfact import BUILT_IN
from hiplora.errors import ConfigError
from hiplora.study.edit_job import EditJob, PreparedEdits
from hiplora.study.edit_journal import EditJournal
from hiplora.study.edit_record import edit_record
from hiplora.study.engine.jobs import Job
from hiplora.study.measure import drift_dict
from hiplora.study.steps.evaluate import drift_reference
from hiplora.study.steps.methods import method_at
from hiplora.study.steps.numbers import rounded

if TYPE_CHECKING:
    from hiplora.study.engine.bench import Bench

PASSED_ON = ("limit", "category", "edits_per_batch", "sample", "steps", "lr", "rows")


def work(bench: "Bench", job: Job, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Edit, or go on after the last stage that an interrupted call finished."""
    prepared = PreparedEdits.of(edit_job(bench, settings))
    drift, mode = settings.get("drift"), settings["mode"]
    if drift and mode == "single":
        raise ConfigError(
            f"{job.name}: drift has no use in the mode single, where no edit stays; leave it out"
        )
    model, tokenizer = bench.model()
    reference = drift_reference(bench, {"drift": drift})
    journal = EditJournal(bench.store.work(job), sequential=mode == "sequential")

    def edited(number: int, editor: Editor) -> None:
        last = reference is not None and number == prepared.stages
        journal.keep(number, editor, drift_dict(editor.model, reference, editor.off) if last else None)

    with tempfile.TemporaryDirectory(prefix="hiplora-") as aside:
        run = prepared.run(
            model,
            tokenizer,
            Path(aside),
            on_stage=journal.hear,
            on_edited=edited,
            done=tuple(journal.stages),
            state=journal.state,
        )
    found = {**edit_record(run), "drift": journal.drift}
    return rounded(found), {"edit_seconds": sum(stage.took["seconds"] for stage in run.stages)}


def edit_job(bench: "Bench", settings: Mapping[str, Any]) -> EditJob:
    """Return what `hiplora edit` would be asked for."""
    method = method_at(bench, settings["method"])
    edits = settings["edits"]
    given: dict[str, Any] = {name: settings.get(name) for name in PASSED_ON}
    return EditJob(
        model=bench.name,
        edits=edits if edits == BUILT_IN else bench.path(edits),
        method=method.pop("name"),
        method_settings=method,
        mode=settings["mode"],
        questions=settings["questions"],
        neighbours=settings["neighbours"],
        seed=settings["seed"],
        **given,
    )
