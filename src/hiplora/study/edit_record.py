"""What a run of edits found, for the record of a study: item by item in columns, without texts and without times."""

from collections.abc import Sequence
from typing import Any

from hiplora.editing import EditOutcome, EditRecord, EditRun, EditStage, LocalityOutcome, Reference, summarise

_OUTCOME = ("success", "preferred", "exact", "log_prob_new", "log_prob_old")
NOT_OF_THE_JOB = ("seconds", "tokens_per_second")  # of a stage's `took`: they differ from run to run


def edit_record(run: EditRun) -> dict[str, Any]:
    """Return a run's results.

    `summary` as `EditRun.summary`; `before` and each stage's `records` are columns with a value an edit
    (`edit_columns`); `stages` have further what was `taught` and what that `took`, the summaries `newest` and `so_far`
    and that of the locality; `questions` are columns with a value an unrelated question: the frozen base's, and the
    mean over the stages that count (the last one of a sequence, else all). None without questions.
    """
    counted = run.stages[-1:] if run.mode == "sequential" else run.stages
    said = [stage.locality for stage in counted if stage.locality is not None]
    return {
        "mode": run.mode,
        "method": run.method,
        "edits": len(run.before),
        "summary": run.summary(),
        "before": edit_columns(run.before),
        "stages": [_stage(stage, run.reference) for stage in run.stages],
        "questions": _questions(run.reference, said) if run.reference is not None else None,
    }


def edit_columns(records: Sequence[EditRecord]) -> dict[str, list[Any] | None]:
    """Return column → a value for each edit.

    `index`, `category`; of the prompt `success`, `preferred`, `exact` (0 or 1), `log_prob_new` and `log_prob_old` in
    nats; the same of the paraphrase, named `paraphrase_…`; `neighbours_kept`, a list of 0 and 1 for each edit, None
    where no edit has neighbours.
    """
    near = [[int(kept) for kept in record.neighbours_kept] for record in records]
    return {
        "index": [record.index for record in records],
        "category": [record.category for record in records],
        **_outcomes("", [record.asked for record in records]),
        **_outcomes("paraphrase_", [record.paraphrased for record in records]),
        "neighbours_kept": near if any(near) else None,
    }


def _outcomes(prefix: str, outcomes: Sequence[EditOutcome]) -> dict[str, list[Any]]:
    columns = {name: [getattr(outcome, name) for outcome in outcomes] for name in _OUTCOME}
    return {
        prefix + name: [int(value) if isinstance(value, bool) else value for value in values]
        for name, values in columns.items()
    }


def _stage(stage: EditStage, reference: Reference | None) -> dict[str, Any]:
    local = stage.locality
    return {
        "taught": list(stage.taught),
        "took": {key: value for key, value in stage.took.items() if key not in NOT_OF_THE_JOB},
        "newest": summarise(stage.newest),
        "so_far": summarise(stage.records),
        "records": edit_columns(stage.records),
        "locality": local.summary(reference) if local is not None and reference is not None else None,
    }


def _questions(reference: Reference, said: Sequence[LocalityOutcome]) -> dict[str, list[float]]:
    columns: dict[str, list[float]] = {
        "correct_before": [int(value) for value in reference.correct],
        "log_prob_before": list(reference.log_probs),
        "edited_log_prob_before": list(reference.edited_log_probs),
    }
    for name, field in (
        ("correct", "correct"),
        ("unchanged", "unchanged"),
        ("log_prob", "log_probs"),
        ("edited_log_prob", "edited_log_probs"),
    ):
        stages = [getattr(outcome, field) for outcome in said]
        columns[name] = [sum(values) / len(values) for values in zip(*stages, strict=True)]
    return columns
