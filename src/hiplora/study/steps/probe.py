"""Probe the base direction by direction: what single directions of its weights are worth on texts and tasks.

Settings: `modules`, `layers`, `directions`, `choice`, `basis`, `principal_rank`, `kinds`, `draws`, `tokens`, `seed` as
of `ProbeSettings`; `texts`, name to source; `scores`, tasks that are scored too, each with its number of items (None:
all); `files`, hashes of what is read.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from hiplora.probing import findings
from hiplora.probing.run import ROWS, ProbeSettings, chosen_modules, probe_model
from hiplora.study.engine.jobs import Job
from hiplora.study.steps.evaluate import score
from hiplora.study.steps.numbers import rounded

if TYPE_CHECKING:
    from hiplora.study.engine.bench import Bench

WINDOW = 512
NOT_OF_THE_PROBE = ("model", "texts", "scores", "files")


def work(bench: "Bench", job: Job, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Probe, or go on after the last intervention that an interrupted call measured.

    Of a task there are two metrics, in per cent: its name, the score, and NAME likelihood.
    """
    given = {name: value for name, value in settings.items() if name not in NOT_OF_THE_PROBE}
    asked = ProbeSettings(model=bench.name, **given)
    model, _ = bench.model()
    reference = bench.reference(settings["texts"], asked.tokens, WINDOW)
    modules = chosen_modules(model, asked)
    journal = bench.store.work(job) / ROWS
    rows = probe_model(model, modules, reference, asked, journal, scores=_scores(bench, settings))
    return {"modules": modules, "records": rounded(rows), "correlations": findings(rows, asked.seed)}, {}


def _scores(bench: "Bench", settings: Mapping[str, Any]) -> Callable[[Any], dict[str, float]] | None:
    tasks = settings.get("scores")
    if not tasks:
        return None

    def measure(model: Any) -> dict[str, float]:
        found = {}
        for task, scored in score(bench, model, {"tasks": tasks, "seed": settings["seed"]}).items():
            for name, field in ((task, "score"), (f"{task} likelihood", "likelihood")):
                if scored[field] is not None:
                    found[name] = sum(scored[field]) / len(scored[field])
        return found

    return measure
