"""Score the base or an adapter on tasks, item by item, and measure how far it drifted from the base on texts.

Settings: `tasks`, name to number of items (None: all); `seed`, of the choice of items; `drift`, None or
{texts: name to source, tokens, window, perhaps documents}; `files`, hashes of what is read. Needs: `adapter`, none for
the base.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hiplora.evaluation.mounting import mounted
from hiplora.study.engine.jobs import Job
from hiplora.study.measure import drift_dict

if TYPE_CHECKING:
    from hiplora.study.engine.bench import Bench

BATCH = 8


def work(bench: "Bench", job: Job, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Score the model with the adapter on, or bare."""
    network, _ = bench.model()
    if "adapter" not in job.needs:
        return {"tasks": score(bench, network, settings), "drift": None}, {}
    reference = drift_reference(bench, settings)
    with mounted(network, bench.artifact(job.needs["adapter"])) as adapted:
        found = {"tasks": score(bench, adapted, settings), "drift": None}
        if reference is not None:
            found["drift"] = drift_dict(adapted, reference)
    return found, {}


def score(bench: "Bench", model: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return, a task, its metric's name and the items' scores, and the likelihood form of both."""
    if not settings["tasks"]:
        return {}
    engine = bench.engine(settings["tasks"], settings["seed"])
    scores = engine.score(model, bench.model()[1], BATCH)
    return {
        task: {"metric": found.name, "form": found.form, **found.to_json()} for task, found in scores.items()
    }


def drift_reference(bench: "Bench", settings: Mapping[str, Any]) -> Any:
    """Return what the bare base makes of the drift texts, None where no drift is asked for."""
    drift = settings["drift"]
    return bench.reference(**drift) if drift else None
