"""Edits together, apart from each other, or one after the other, with what each stage did."""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from torch import nn

from hiplora.editing.alphaedit import AlphaEdit, AlphaEditor
from hiplora.editing.editors import Adapt, AdapterEditor, Editor, EditTraining
from hiplora.editing.edits import Edit, Question
from hiplora.editing.measure import (
    ask,
    measure_edits,
    summarise,
    summarise_locality,
    unrelated_targets,
    with_old_answers,
)
from hiplora.run_folder import RunFolder

Values = dict[str, Any]


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
    folder: RunFolder | None = None,
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
        folder: keeps the finished groups, so that the same call goes on where it was interrupted.
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
    targets = unrelated_targets(questions, edits)
    keep: Callable[[str, Callable[[], Values]], Values] = folder.stage if folder else lambda _, work: work()
    if isinstance(method, AlphaEdit):
        editor: Editor = AlphaEditor(model, tokenizer, method)
    else:
        editor = AdapterEditor(model, tokenizer, method, training or EditTraining(steps=500), progress)

    def measured(asked: Sequence[Edit], indices: Iterable[int]) -> Values:
        records = measure_edits(editor.model, tokenizer, {index: asked[index] for index in indices})
        answers = ask(editor.model, tokenizer, questions, targets)
        return {"records": _columns(records), "answers": _columns(answers)}

    def bare() -> Values:
        with editor.off():
            known = with_old_answers(editor.model, tokenizer, edits)
            return {"old": [edit.old for edit in known], **measured(known, itertools.chain(*groups))}

    def teach(number: int) -> Values:
        if not sequential:
            editor.reset()
        took = editor.teach([known[index] for index in groups[number - 1]])
        so_far = groups[:number] if sequential else groups[number - 1 : number]
        found = {"took": took, **measured(known, itertools.chain(*so_far))}
        if on_edited:
            on_edited(number, editor)
        if folder and sequential:
            state = {name: tensor.contiguous() for name, tensor in editor.state().items()}
            save_file(state, _state(folder, number))
        return found

    stages: list[Values] = []
    try:
        before = keep("bare", bare)
        known = [replace(edit, old=old) for edit, old in zip(edits, before["old"], strict=True)]
        for number in range(1, len(groups) + 1):
            if folder and _state(folder, number - 1).is_file() and not folder.has(f"group-{number:03d}"):
                editor.restore(load_file(_state(folder, number - 1)))
            stages.append(keep(f"group-{number:03d}", functools.partial(teach, number)))
            if folder:
                _state(folder, number - 1).unlink(missing_ok=True)
    finally:
        editor.close()
    return _record(before, stages, groups, questions, sequential, texts)


def edit_groups(count: int, size: int | None = None) -> list[list[int]]:
    """Return the indices of so many edits in groups of `size`; None is all in one."""
    size = size or count
    return [list(range(first, min(first + size, count))) for first in range(0, count, size)]


def _state(folder: RunFolder, number: int) -> Path:
    """Where a sequence keeps what it was after so many groups."""
    return folder.path / "stages" / f"group-{number:03d}.safetensors"


def _columns(table: pd.DataFrame) -> Values:
    columns = table.astype(object).where(table.notna(), None).to_dict("list")
    if not any(columns.get("neighbours_kept", [True])):
        columns["neighbours_kept"] = None
    return columns


def _record(
    before: Values,
    stages: Sequence[Values],
    groups: Sequence[Sequence[int]],
    questions: Sequence[Question],
    sequential: bool,
    texts: bool,
) -> Values:
    """Summarise what the stages found."""

    def shown(columns: Mapping[str, Any]) -> Values:
        return {name: values for name, values in columns.items() if texts or "written" not in name}

    bare, asked = (pd.DataFrame(before[name]) for name in ("records", "answers"))
    found, records, answers = [], [], []
    for group, stage in zip(groups, stages, strict=True):
        records.append(pd.DataFrame(stage["records"]))
        answers.append(pd.DataFrame(stage["answers"]))
        found.append(
            {
                "taught": list(group),
                "took": {name: value for name, value in stage["took"].items() if name != "seconds"},
                "newest": summarise(records[-1][records[-1]["index"].isin(group)]),
                "so_far": summarise(records[-1]),
                "records": shown(stage["records"]),
                "locality": summarise_locality(asked, answers[-1]) if questions else None,
            }
        )
    last = slice(-1, None) if sequential else slice(None)  # the last stage of a sequence has all edits
    summary: Values = {"before": summarise(bare), "after": summarise(pd.concat(records[last], ignore_index=True))}
    told = None
    if questions:
        summary["locality"] = pd.DataFrame([one["locality"] for one in found[last]]).mean().to_dict()
        after = [one.assign(written=one["written"] == asked["written"]).astype(float) for one in answers[last]]
        mean = (sum(after) / len(after)).rename(columns={"written": "unchanged"})
        parts = [pd.DataFrame(map(asdict, questions))] if texts else []
        told = shown(pd.concat([*parts, asked.add_suffix("_before"), mean], axis=1).to_dict("list"))
    return {
        "edits": len(bare),
        "summary": summary,
        "before": shown(before["records"]),
        "stages": found,
        "questions": told,
        "seconds": sum(stage["took"]["seconds"] for stage in stages),
    }
