"""Facts edited by each method: whether the edits took, in other words too, and what became of everything else (C.4)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from hiplora.reporting import plots
from hiplora.study.protocols.settings import OfMethods, Positive, Settings
from hiplora.study.records import Findings, joined, paper_value, table, tidy, with_jobs
from hiplora.study.statistics import differences, drift, replicates, summary, with_spread

if TYPE_CHECKING:
    from hiplora.study.builder import Study
    from hiplora.study.jobs import Job
    from hiplora.study.store import Results

ALPHAEDIT = "alphaedit"  # the editor that trains nothing
BUILT_IN = "builtin"
BY = ["set", "mode", "method"]
SetName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]  # becomes part of file names
SHOWN = {  # metric → heading, unit
    "edit success": ("Edit success", "%"),
    "preferred": ("log p(new) > log p(old)", "%"),
    "match": ("Match", "%"),
    "paraphrase success": ("Paraphrase", "%"),
    "neighbours kept": ("Neighbours kept", "%"),
    "locality": ("Locality: accuracy lost", "pp"),
    "locality damage": ("Answers changed", "%"),
    "log-probability change": ("Log p of unrelated answers", "nats"),
    "edited log-probability change": ("Log p of edited targets", "nats"),
}
HEADINGS = {metric: heading for metric, (heading, _) in SHOWN.items()}
UNITS = {metric: unit for metric, (_, unit) in SHOWN.items()}
COLUMNS = {
    "success": "edit success",
    "preferred": "preferred",
    "exact": "match",
    "paraphrase_success": "paraphrase success",
}


class EditedFacts(Settings):
    """A set of edits."""

    edits: str = Field(default=BUILT_IN, description="`builtin`, or a file of the data folder.")
    title: str = Field(default="", description="As tables show it.")
    category: Literal["Entity/Attribute", "Relation/Fact", "Temporal/Numeric"] | None = Field(
        default=None,
        description="The edits of one category alone, so that their locality is that category's.",
    )
    limit: Positive | None = Field(default=None, description="The first so many edits.")
    neighbours: bool = Field(default=False, description="Ask the file's neighbourhood prompts too.")


class Editing(OfMethods):
    """Facts edited by each method: success, paraphrases, locality."""

    name: ClassVar[str] = "editing"
    title: ClassVar[str] = "Knowledge editing"
    sets: dict[SetName, EditedFacts] = Field(
        default={"edit-set": EditedFacts()}, min_length=1, description="Sets of edits by name."
    )
    modes: list[Literal["single", "batch", "sequential"]] = Field(
        default=["batch"], min_length=1, description="How edits are made."
    )
    alphaedit: dict[str, Any] | None = Field(
        default=None, description="Settings of AlphaEdit as one more row; none: leave it out."
    )
    steps: Positive = Field(default=500, description="Training steps of a batch.")
    single_steps: Positive = Field(default=20, description="Training steps of a single edit.")
    lr: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={},
        description="Method → learning rate on edits, where it is not `train.lr`; a method's own or chosen rate is "
        "for tasks and is not used here.",
    )
    edits_per_batch: Positive | None = Field(default=None, description="Edits of a batch (sequential: a stage).")
    sample: Positive | None = Field(default=None, description="How many edits are made one by one.")
    rows: Positive | None = Field(default=None, description="Edits in one training step.")
    questions: int = Field(default=500, ge=0, description="Unrelated questions for the locality.")


def jobs(study: Study, settings: Editing) -> list[Job]:
    """Edit every set in every mode by every method, AlphaEdit among them if asked for."""
    return [job for job, _ in _runs(study, settings)]


def tables(study: Study, settings: Editing, results: Results) -> Findings:
    """Return a table a set and mode with the drift after the last edit, one by categories, the course of a sequence."""
    runs = list(_runs(study, settings))
    moved = drift(tidy(results, runs, BY), BY[:2])
    numbers = with_jobs(joined(_measured(_items(results, runs)), moved, columns=["text"]), runs, BY)
    found = Findings(settings.name, settings.title, numbers)
    for (name, mode), rows in numbers.groupby(BY[:2], sort=False):
        facts, stem = settings.sets[name], f"{settings.name}-{name}-{mode}"
        title = f"{facts.title or name}, {mode}"
        in_paper = mode == "batch" and facts.edits == BUILT_IN and facts.category is None
        found.tables[stem] = title, _table(rows, in_paper)
        kinds = rows[rows.category.notna()]
        kinds = kinds.assign(column=kinds.category + ", " + kinds.metric.str.split().str[0])
        found.tables[f"{stem}-categories"] = f"{title}: success by category, %", table(kinds, "column")
        course = rows[rows.metric == "edit success so far"]
        if not course.empty:
            figure = plots.lines(
                course, "edits", "estimate", "method", low="low", high="high",
                xlabel="edits so far", ylabel="edit success (%)",
            )  # fmt: skip
            caption = f"{title}: edits that still work, stage after stage"
            found.figures[f"{settings.name}-{name}-sequence"] = caption, figure
    rates = [f"{study.row(name).title} {_rate(study, settings, name):g}" for name in settings.methods]
    found.text = (
        "Edit success: the answer matches or is likelier than the old one. Locality: accuracy before − after on "
        "unrelated questions, in pp. Log p: mean change in nats, of the questions' own answers, and of the edits' "
        "new ones where they do not belong (lower is better there). Drift: KL from the base in thousandths of a "
        f"nat a token. Intervals: 95 % over edits and questions. Learning rates on edits: {', '.join(rates)}."
    )
    return found


def _table(rows: pd.DataFrame, in_paper: bool) -> pd.DataFrame:
    drifts = rows.metric == "drift"
    shown = rows.assign(
        column=rows.metric.map(HEADINGS).where(~drifts, "Drift, " + rows.text.astype(str)),
        estimate=rows.estimate.where(~drifts, 1000 * rows.estimate),
    )
    wide = table(
        shown[shown.column.notna()],
        "column",
        digits=lambda row: 2 if UNITS.get(row.metric, "nats") == "nats" else 1,
        paper=_paper if in_paper else None,
    )
    order = [heading for heading in HEADINGS.values() if heading in wide]
    return wide[[*order, *wide.columns.difference(order, sort=False)]]


def _paper(row: Any) -> float | None:
    column = {"edit success": "Edit success", "locality": "Locality"}.get(row.metric)
    return paper_value("editing", row.method, column) if column else None


def _rate(study: Study, settings: Editing, method: str) -> float:
    """A method's learning rate on edits; one that was chosen on a task's rows is not what a handful of edits needs."""
    return settings.lr.get(method, study.recipe.train.lr)


def _runs(study: Study, settings: Editing) -> Iterator[tuple[Job, dict]]:
    methods = [*settings.methods, *([ALPHAEDIT] if settings.alphaedit is not None else [])]
    for name, mode, method in itertools.product(settings.sets, settings.modes, methods):
        title = study.row(method).title if method != ALPHAEDIT else "AlphaEdit"
        for seed in study.seeds(settings):
            job = _edit(study, settings, name, mode, method, title, seed)
            yield job, {"set": name, "mode": mode, "method": title, "seed": seed}


def _edit(study: Study, settings: Editing, name: str, mode: str, method: str, title: str, seed: int) -> Job:
    """The job of a run. AlphaEdit trains nothing: its rate and steps are its own."""
    from hiplora.study.builder import as_written

    facts, trains, single = settings.sets[name], method != ALPHAEDIT, mode == "single"
    given = {"name": ALPHAEDIT, **(settings.alphaedit or {})}
    if trains:
        given = as_written(study.row(method).method)
    evaluation = study.recipe.evaluation.drift
    texts = None if evaluation is None or single else evaluation.settings()
    files = [None if facts.edits == BUILT_IN else facts.edits, given.get("calibration_text")]
    files += [source.partition(":")[0] for source in (texts or {"texts": {}})["texts"].values()]
    asked = {
        "method": given,
        **facts.model_dump(include={"edits", "limit", "neighbours"}),
        "mode": mode,
        "edits_per_batch": None if single else settings.edits_per_batch,
        "sample": settings.sample if single else None,
        "steps": (settings.single_steps if single else settings.steps) if trains else None,
        "lr": _rate(study, settings, method) if trains else None,
        "rows": settings.rows if trains else None,
        "questions": settings.questions,
        "drift": texts,
        "seed": seed,
        "files": study.hashes(files),
        **({} if facts.category is None else {"category": facts.category}),
    }
    factors = study.factors(study.row(method)) if trains else None
    needs = {} if factors is None else {"factors": factors}
    return study.job("edit", f"edit {name} by {title}, {mode}, seed {seed}", asked, **needs)


def _items(results: Results, runs: list) -> pd.DataFrame:
    """A row an edit or question: set, mode, method, seed, metric, task, item, value; category, or edits so far."""
    parts, lost = [], set()
    for job, labels in runs:
        found = results.get(job)
        if found is None:
            lost.add(tuple(labels[name] for name in BY))
            continue
        parts += [part.assign(**labels) for part in _of_edits(found, labels["set"])]
        if found["questions"]:
            parts.append(_of_questions(found["questions"]).assign(**labels))
    items = joined(*parts, columns=[*BY, "seed", "metric", "category", "edits", "task", "item", "value"])
    return items[[tuple(row) not in lost for row in items[BY].itertuples(index=False)]]


def _of_edits(found: dict[str, Any], name: str) -> Iterator[pd.DataFrame]:
    """All edits that count (after the last stage of a sequence, else of every stage), by category, and the course."""
    frames = []
    for stage in found["stages"]:
        records = dict(stage["records"])
        near = records.pop("neighbours_kept", None) or [[]] * len(records["index"])
        frame = pd.DataFrame({"item": records["index"], "category": records["category"]})
        for column, metric in COLUMNS.items():
            frame[metric] = 100.0 * np.asarray(records[column], dtype=float)
        frame["neighbours kept"] = [100 * float(np.mean(kept)) if kept else np.nan for kept in near]
        frames.append(frame)
        if found["mode"] == "sequential":
            course = frame[["item"]].assign(value=frame["edit success"], task=f"{name} edits")
            yield course.assign(metric="edit success so far", edits=len(frame))
    whole = frames[-1] if found["mode"] == "sequential" else pd.concat(frames)
    long = whole.melt(["item", "category"], var_name="metric").dropna(subset="value")
    kinds = long[long.metric.isin(("edit success", "paraphrase success"))]
    yield kinds.assign(metric=kinds.metric + " by category", task=name + " " + kinds.category)
    near = long.metric == "neighbours kept"
    yield long.drop(columns="category").assign(task=np.where(near, f"{name} neighbours", f"{name} edits"))


def _of_questions(asked: dict[str, list[float]]) -> pd.DataFrame:
    """What became of the unrelated questions: in pp and %, and in nats."""
    q = pd.DataFrame(asked).astype(float)
    values = {
        "locality": 100 * (q.correct_before - q.correct),
        "locality damage": 100 * (1 - q.unchanged),
        "log-probability change": q.log_prob - q.log_prob_before,
        "edited log-probability change": q.edited_log_prob - q.edited_log_prob_before,
    }
    long = pd.DataFrame(values).rename_axis("item").reset_index().melt("item", var_name="metric")
    return long.assign(task="questions")


def _measured(items: pd.DataFrame) -> pd.DataFrame:
    """Means, by category and stage too, and differences."""
    by = ["set", "mode", "metric", "method"]
    parts = []
    for further in ("category", "edits"):
        rows = items[items[further].notna()]
        if not rows.empty:
            parts.append(_summary(rows, [*by, further])[0].reset_index().assign(unit="%"))
    rows = items[items.metric.isin(SHOWN)]
    if not rows.empty:
        whole, draws, seeds = _summary(rows, by)
        parts.append(whole.reset_index().assign(unit=lambda one: one.metric.map(UNITS)))
        apart = with_spread(summary(differences(draws)), differences(seeds))
        apart = apart.join(whole["items"]).reset_index()
        unit = apart.metric.map(UNITS).replace("%", "pp")
        parts.append(apart.assign(metric=apart.metric + " difference", unit=unit))
    return joined(*parts, columns=[*by, "category", "unit", "estimate", "low", "high"])


def _summary(rows: pd.DataFrame, by: list[str]) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Summaries, replicates and each seed's own value: an edit counts with its mean over the seeds that made it."""
    draws = replicates(rows, by)
    seeds = rows.astype({"value": float}).groupby([*by, "seed"], sort=False)["value"].mean().to_frame(0)
    found = with_spread(summary(draws), seeds)
    return found.assign(items=rows.groupby(by)["item"].nunique()), draws, seeds
