"""Edits together, apart from each other, or one after the other, with what each stage did."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd
from peft import PeftConfig
from torch import nn

from hiplora.editing.alphaedit import AlphaEdit, AlphaEditor
from hiplora.editing.editors import Adapt, AdapterEditor, Editor, EditTraining
from hiplora.editing.edits import Edit, Question
from hiplora.editing.measure import Locality, measure_edits, summarise


def run_edits(
    model: nn.Module,
    tokenizer: Any,
    method: PeftConfig | Adapt | AlphaEdit,
    edits: Sequence[Edit],
    training: EditTraining | None = None,
    questions: Sequence[Question] = (),
    *,
    groups: Sequence[Sequence[int]] | None = None,
    sequential: bool = False,
    texts: bool = True,
    on_edited: Callable[[int, Editor], None] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Edit a bare model group after group, measure after each, and leave the model behind bit for bit as it was.

    Args:
        model: the bare base model, a causal language model.
        tokenizer: its tokenizer.
        method: a configuration of PEFT, a function that puts an adapter on the model, or AlphaEdit's settings.
        edits: what to teach.
        training: how adapters are trained on a group; the default is the paper's 500 steps. AlphaEdit has its own.
        questions: unrelated ones, which measure the locality. The bare model's answers are taken before the first edit.
        groups: indices of the edits that are taught together (`edit_groups`); None is all.
        sequential: teach group after group on top of each other, and measure all edits so far; else each group is taken
            back before the next.
        texts: whether the record has what the model wrote.
        on_edited: is given a group's number, from 1, and the editor while its edits are in the model.
        progress: show a bar on a terminal.

    Returns:
        the record, for JSON: `edits`, their number; `summary` (`before`, `after`, and with questions `locality`); what
        the bare base says about the edits (`before`: columns with a value an edit, as of `measure_edits`); `stages`,
        each with the indices `taught`, what that `took`, such `records` of the edits in the model, and summaries;
        `questions`, columns with a value an unrelated question, before and after; `seconds` of teaching.

    Raises:
        AdapterError: the loss is not finite, or the base cannot be restored.
        DataError: AlphaEdit does not find an edit's subject in its prompt.
    """
    groups = groups or [range(len(edits))]
    elsewhere = Locality(model, tokenizer, questions, edits) if questions else None
    before = measure_edits(model, tokenizer, {index: edits[index] for group in groups for index in group})
    if isinstance(method, AlphaEdit):
        editor: Editor = AlphaEditor(model, tokenizer, method)
    else:
        editor = AdapterEditor(model, tokenizer, method, training or EditTraining(steps=500), progress)
    stages: list[dict[str, Any]] = []
    measured: list[pd.DataFrame] = []
    answered: list[pd.DataFrame] = []
    seconds, seen = 0.0, list[int]()
    try:
        for number, group in enumerate(groups, start=1):
            if not sequential and stages:
                editor.reset()
                seen = []
            seen += group
            took = editor.teach([edits[index] for index in group])
            seconds += took.pop("seconds")
            measured.append(measure_edits(editor.model, tokenizer, {index: edits[index] for index in seen}))
            answered += [elsewhere.measure(editor.model)] if elsewhere else []
            stages.append(
                {
                    "taught": list(group),
                    "took": took,
                    "newest": summarise(measured[-1][measured[-1]["index"].isin(group)]),
                    "so_far": summarise(measured[-1]),
                    "records": _columns(measured[-1], texts),
                    "locality": elsewhere.summarise(answered[-1]) if elsewhere else None,
                }
            )
            if on_edited:
                on_edited(number, editor)
    finally:
        editor.close()
    if sequential:  # the last stage has all edits
        measured, answered = measured[-1:], answered[-1:]
    summary: dict[str, Any] = {
        "before": summarise(before),
        "after": summarise(pd.concat(measured, ignore_index=True)),
    }
    if elsewhere:
        summary["locality"] = pd.DataFrame(map(elsewhere.summarise, answered)).mean().to_dict()
    return {
        "edits": len(before),
        "summary": summary,
        "before": _columns(before, texts),
        "stages": stages,
        "questions": _questions(elsewhere, answered, texts) if elsewhere else None,
        "seconds": seconds,
    }


def edit_groups(count: int, size: int | None = None) -> list[list[int]]:
    """Return the indices of so many edits in groups of `size`; None is all in one."""
    size = size or count
    return [list(range(first, min(first + size, count))) for first in range(0, count, size)]


def _columns(records: pd.DataFrame, texts: bool) -> dict[str, list[Any] | None]:
    columns = records.to_dict("list")
    if not texts:
        del columns["written"], columns["paraphrase_written"]
    if not any(columns["neighbours_kept"]):
        columns["neighbours_kept"] = None
    return columns


def _questions(elsewhere: Locality, answered: list[pd.DataFrame], texts: bool) -> dict[str, list[Any]]:
    """The bare base's answers, and the mean of what was answered later."""
    after = sum(answers.drop(columns="written") for answers in answered) / len(answered)
    columns = pd.concat([elsewhere.before.add_suffix("_before"), after], axis=1)
    if not texts:
        return columns.drop(columns="written_before").to_dict("list")
    asked = pd.DataFrame([asdict(question) for question in elsewhere.questions])
    return pd.concat([asked, columns], axis=1).to_dict("list")
