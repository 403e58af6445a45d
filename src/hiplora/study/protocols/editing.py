"""Facts edited by each method: whether edits took, also on paraphrases, and what they did to everything else (C.4)."""

import itertools
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from hiplora.data.examples import Block
from hiplora.editing.edits import BUILT_IN, Category
from hiplora.editing.job import EDITORS
from hiplora.reporting import plots
from hiplora.study.builder import as_written
from hiplora.study.jobs import Job
from hiplora.study.protocols.settings import AboveZero, Done, Findings, OfMethods, Positive, Run, Study
from hiplora.study.records import joined, table, tidy
from hiplora.study.statistics import differences, drift, opened, replicates, summary

COURSE = "edit success so far"
Mode = Literal["single", "batch", "sequential"]
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
COLUMNS = {
    "success": "edit success",
    "preferred": "preferred",
    "exact": "match",
    "paraphrase_success": "paraphrase success",
}


class EditedFacts(Block):
    """A set of edits."""

    edits: str = Field(default=BUILT_IN, description="`builtin`, or a file of the data folder.")
    title: str = Field(default="", description="As tables show it.")
    category: Category | None = Field(default=None, description="The edits, and locality, of one category alone.")
    limit: Positive | None = Field(default=None, description="The first so many edits.")
    neighbours: bool = Field(default=False, description="Ask the file's neighbourhood prompts too.")


DEFAULT_SETS = {"edit-set": EditedFacts()}


class Editing(OfMethods):
    """Facts edited by each method: success, paraphrases, locality."""

    whole: ClassVar[tuple[str, ...]] = ("set", "mode", "method")
    sets: dict[SetName, EditedFacts] = Field(default=DEFAULT_SETS, min_length=1, description="Sets of edits by name.")
    modes: list[Mode] = Field(default=["batch"], min_length=1, description="How edits are made.")
    alphaedit: dict[str, Any] | None = Field(default=None, description="Settings of AlphaEdit, as one more row.")
    crispedit: dict[str, Any] | None = Field(default=None, description="Settings of CrispEdit, as one more row.")
    steps: Positive = Field(default=500, description="Training steps of a batch.")
    single_steps: Positive = Field(default=20, description="Training steps of a single edit.")
    lr: dict[str, AboveZero] = Field(
        default={}, description="Method → learning rate on edits, if not `train.lr`; a chosen rate is for tasks only."
    )
    edits_per_batch: Positive | None = Field(default=None, description="Edits of a batch (sequential: a stage).")
    sample: Positive | None = Field(default=None, description="How many edits are made one by one.")
    rows: Positive | None = Field(default=None, description="Edits in one training step.")
    questions: int = Field(default=500, ge=0, description="Unrelated questions for the locality.")

    def runs(self, study: Study) -> list[Run]:
        """Edit every set in every mode by every method, and by those that edit weights if asked for."""
        methods = [*self.methods, *(name for name in EDITORS if getattr(self, name) is not None)]
        runs = []
        for name, mode, method, seed in itertools.product(self.sets, self.modes, methods, study.seeds(self)):
            title = EDITORS[method].title if method in EDITORS else study.row(method).title
            label = {"set": name, "mode": mode, "method": title, "seed": seed}
            runs.append((self._edit(study, method, label), label))
        return runs

    def tables(self, study: Study, done: Done) -> Findings:
        """Return a table a set and mode with the drift after the last edit, one by categories, a sequence's course."""
        items = joined(
            *(part.assign(**labels) for _, record, labels in done for part in _items(record, labels["set"]))
        )
        numbers = joined(_measured(items), drift(tidy(done), ["set", "mode"]), columns=["text"])
        findings = Findings(numbers)
        for (name, mode), rows in numbers.groupby(["set", "mode"], sort=False):
            facts, stem = self.sets[name], f"{name}-{mode}"
            title = f"{facts.title or name}, {mode}"
            in_paper = mode == "batch" and facts.edits == BUILT_IN and facts.category is None
            findings.tables[stem] = title, _table(rows, "editing" if in_paper else "")
            kinds = rows[rows.category.notna()]
            kinds = kinds.assign(column=kinds.category + ", " + kinds.metric.str.split().str[0])
            findings.tables[f"{stem}-categories"] = f"{title}: success by category, %", table(kinds)
            if mode == "sequential":
                course = rows[rows.metric == COURSE].sort_values("edits", kind="stable")
                figure = plots.lines(
                    course, "edits", "estimate", "method", low="low", high="high",
                    xlabel="edits so far", ylabel="edit success (%)",
                )  # fmt: skip
                caption = f"{title}: edits that still work, stage after stage"
                findings.figures[f"{name}-sequence"] = caption, figure
        titles = {name: study.row(name).title for name in self.methods}
        titles |= {} if self.crispedit is None else {"crispedit": EDITORS["crispedit"].title}
        rates = [f"{title} {self._rate(study, name):g}" for name, title in titles.items()]
        findings.text = (
            "Edit success: the answer matches or is likelier than the old one. Locality: accuracy before − after on "
            "unrelated questions. Log p: mean change, of the questions' own answers, and of the edits' new ones where "
            "they do not belong (lower is better there). Drift: KL from the base in thousandths of a nat a token. "
            f"Intervals: over edits and questions. Learning rates on edits: {', '.join(rates)}."
        )
        return findings

    def _rate(self, study: Study, method: str) -> float:
        """A method's learning rate on edits; one chosen on a task's rows is not what a handful of edits needs."""
        return self.lr.get(method, study.recipe.train.lr)

    def _edit(self, study: Study, method: str, label: dict[str, Any]) -> Job:
        """The job of a run. AlphaEdit trains nothing: its rate and steps are its own."""
        facts, trains, single = self.sets[label["set"]], method != "alphaedit", label["mode"] == "single"
        if method in EDITORS:
            block, needs = {"name": method, **getattr(self, method)}, {}
        else:
            block, factors = as_written(study.row(method).method), study.factors(study.row(method))
            needs = {} if factors is None else {"factors": factors}
        texts = None if single else study.recipe.evaluation.drift
        files = [None if facts.edits == BUILT_IN else facts.edits, block.get("calibration_text")]
        settings = {
            "method": block,
            **facts.model_dump(include={"edits", "limit", "neighbours"}),
            "mode": label["mode"],
            "edits_per_batch": None if single else self.edits_per_batch,
            "sample": self.sample if single else None,
            "steps": (self.single_steps if single else self.steps) if trains else None,
            "lr": self._rate(study, method) if trains else None,
            "rows": self.rows if trains else None,
            "questions": self.questions,
            "drift": texts and texts.settings(),
            "seed": label["seed"],
            "files": study.hashes([*files, *(texts.files if texts else ())]),
            **({} if facts.category is None else {"category": facts.category}),
        }
        return study.job("edit", "edit {set} by {method}, {mode}, seed {seed}".format(**label), settings, **needs)


def _items(record: dict[str, Any], name: str) -> Iterator[pd.DataFrame]:
    """A row an edit or question: metric, task, item, value; category, or edits so far.

    All edits that count (after the last stage of a sequence, else of every stage), by category too, and the course of a
    sequence; then the questions.
    """
    result, frames = record["result"], []
    for stage in result["stages"]:
        records = dict(stage["records"])
        neighbours = records.pop("neighbours_kept", None) or [[]] * len(records["index"])
        frame = pd.DataFrame({"item": records["index"], "category": records["category"]})
        for column, metric in COLUMNS.items():
            frame[metric] = 100.0 * np.asarray(records[column], dtype=float)
        frame["neighbours kept"] = [100 * float(np.mean(kept)) if kept else np.nan for kept in neighbours]
        frames.append(frame)
        if result["mode"] == "sequential":
            course = frame[["item"]].assign(value=frame["edit success"], task=f"{name} edits")
            yield course.assign(metric=COURSE, edits=len(frame))
    edits = frames[-1] if result["mode"] == "sequential" else pd.concat(frames)
    long = edits.melt(["item", "category"], var_name="metric").dropna(subset="value")
    kinds = long[long.metric.isin(("edit success", "paraphrase success"))]
    yield kinds.assign(metric=kinds.metric + " by category", task=name + " " + kinds.category)
    is_neighbour = long.metric == "neighbours kept"
    yield long.drop(columns="category").assign(task=np.where(is_neighbour, f"{name} neighbours", f"{name} edits"))
    if result["questions"]:
        q = pd.DataFrame(result["questions"]).astype(float)
        values = {
            "locality": 100 * (q.correct_before - q.correct),
            "locality damage": 100 * (1 - q.unchanged),
            "log-probability change": q.log_prob - q.log_prob_before,
            "edited log-probability change": q.edited_log_prob - q.edited_log_prob_before,
        }
        long = pd.DataFrame(values).rename_axis("item").reset_index().melt("item", var_name="metric")
        yield long.assign(task="questions")


def _measured(items: pd.DataFrame) -> pd.DataFrame:
    """Means, by category and stage too, and differences; an edit counts with its mean over the seeds that made it."""
    labels = ["set", "mode", "metric", "method", "category", "edits"]
    items = items.reindex(columns=[*labels, "seed", "task", "item", "value"]).fillna({"category": "", "edits": 0})
    draws, groups = replicates(items, labels), items.groupby(labels)
    counts = groups["item"].nunique().rename("items")
    own = summary(draws).assign(items=counts, seeds=groups["seed"].nunique()).reset_index()
    paired = summary(differences(draws.query("category == '' and edits == 0"))).join(counts).reset_index()
    units = {metric: unit for metric, (_, unit) in SHOWN.items()}
    numbers = joined(
        own.assign(unit=own.metric.map(units).fillna("%")),
        paired.assign(unit=paired.metric.map(units).replace("%", "pp"), metric=paired.metric + " difference"),
    )
    shares = numbers.unit.isin(("%", "pp"))
    numbers.loc[shares] = opened(numbers[shares], numbers["items"][shares])
    category, edits = numbers.category, numbers.edits
    return numbers.assign(category=category.where(category != ""), edits=edits.where(edits > 0))


def _table(rows: pd.DataFrame, paper: str) -> pd.DataFrame:
    drifts = rows.metric == "drift"
    headings = {metric: heading for metric, (heading, _) in SHOWN.items()}
    shown = rows.assign(
        column=rows.metric.map(headings).where(~drifts, "Drift, " + rows.text.astype(str)),
        estimate=rows.estimate.where(~drifts, 1000 * rows.estimate),
        digits=np.where(rows.unit.isin(("nats", "nats/token")), 2, 1),
    )
    return table(shown[shown.column.notna()], paper=paper, order=list(headings.values()))
