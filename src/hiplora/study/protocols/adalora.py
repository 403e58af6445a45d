"""The comparison with AdaLoRA: the single-task table of the methods that it names (Table 12 of the paper)."""

from hiplora.recipes.protocols import OfMethods
from hiplora.reporting.study.spec import Section
from hiplora.study.builder import Study
from hiplora.study.engine.jobs import Job
from hiplora.study.protocols import single_task
from hiplora.study.results import Results


def jobs(study: Study, settings: OfMethods) -> list[Job]:
    """The jobs of the single-task table, which shares them."""
    return single_task.jobs(study, settings)


def section(study: Study, settings: OfMethods, results: Results) -> Section:
    """The single-task section of these methods."""
    return single_task.single_task_section(
        study, settings, results, "adalora", "Comparison with AdaLoRA", "adalora"
    )
