"""Edit facts in the base by a method, measure what that did, and take them out again.

Settings: `method`, a method of a recipe or {name: alphaedit, …}; `edits`, "builtin" or a file of the study; `limit`,
`category`, `mode`, `edits_per_batch`, `sample`, `steps`, `lr`, `rows`, `questions`, `neighbours`, `seed`
as of `EditJob`, None its default; `drift` as of `evaluate`, measured after the last edit (no use one by one); `files`,
hashes of what is read.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hiplora.editing import Editor
from hiplora.editing.edits import BUILT_IN
from hiplora.editing.job import EditJob, PreparedEdits
from hiplora.errors import ConfigError
from hiplora.study.engine.jobs import Job
from hiplora.study.measure import drift_dict
from hiplora.study.steps.evaluate import drift_reference
from hiplora.study.steps.methods import method_at
from hiplora.study.steps.numbers import rounded

if TYPE_CHECKING:
    from hiplora.study.engine.bench import Bench

NOT_OF_THE_JOB = ("model", "method", "edits", "drift", "files")


def work(bench: "Bench", job: Job, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Edit, or go on after the last stage that an interrupted call finished."""
    prepared = PreparedEdits(edit_job(bench, settings))
    if settings.get("drift") and settings["mode"] == "single":
        raise ConfigError(
            f"{job.name}: drift has no use in the mode single, where no edit stays; leave it out"
        )
    model, tokenizer = bench.model()
    reference = drift_reference(bench, {"drift": settings.get("drift")})

    def edited(number: int, editor: Editor) -> dict[str, Any]:
        if reference is None or number < prepared.stages:
            return {}
        return {"drift": drift_dict(editor.model, reference, editor.off)}

    run = prepared.run(model, tokenizer, bench.store.work(job), on_edited=edited)
    found = {**run.as_dict(), "drift": run.stages[-1].extra.get("drift")}
    return rounded(found), {"edit_seconds": sum(stage.took["seconds"] for stage in run.stages)}


def edit_job(bench: "Bench", settings: Mapping[str, Any]) -> EditJob:
    """Return what `hiplora edit` would be asked for."""
    method, edits = method_at(bench, settings["method"]), settings["edits"]
    return EditJob(
        model=bench.name,
        edits=edits if edits == BUILT_IN else bench.path(edits),
        method=method.pop("name"),
        method_settings=method,
        **{name: value for name, value in settings.items() if name not in NOT_OF_THE_JOB},
    )
