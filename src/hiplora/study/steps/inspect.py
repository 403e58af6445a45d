"""Tell where an adapter's update lies on the spectrum of the base weights.

Settings: `rank`, how many leading directions of each weight count as principal. Needs: `adapter`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hiplora.study.engine.jobs import Job
from hiplora.study.measure import allocation, energy_inside
from hiplora.study.steps.numbers import rounded

if TYPE_CHECKING:
    from hiplora.study.engine.bench import Bench


def work(bench: "Bench", job: Job, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a row for each module, and which share of the update's energy is in the principal subspaces."""
    rows = allocation(bench.artifact(job.needs["adapter"]), bench.name, settings["rank"])
    return rounded({"modules": rows, "energy_inside": energy_inside(rows)}), {}
