"""Merge adapters by a rule and score the merged model, item by item, with its drift from the base.

Settings: `rule` and `options` as `hiplora.merging.merge` takes them; the rest as those of `evaluate`. Needs: the
adapters, merged in the order of their names.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hiplora.evaluation.mounting import applied, holding
from hiplora.merging import merge
from hiplora.study.engine.jobs import Job
from hiplora.study.measure import drift_dict
from hiplora.study.steps.evaluate import drift_reference, score

if TYPE_CHECKING:
    from hiplora.study.engine.bench import Bench


def work(bench: "Bench", job: Job, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Merge, add the result to the weights for a while, and score."""
    network, _ = bench.model()
    reference = drift_reference(bench, settings)
    adapters = [bench.artifact(job.needs[name]) for name in sorted(job.needs)]
    merged = merge(adapters, settings["rule"], base=bench.name, options=settings["options"])
    weights = {name: network.get_submodule(name).weight for name in merged.modules}
    with applied(network, merged) as changed:
        found = {"tasks": score(bench, changed, settings), "drift": None}
        if reference is not None:
            found["drift"] = drift_dict(changed, reference, lambda: holding(changed, weights))
    return found, {}
