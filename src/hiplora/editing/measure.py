"""What became of single edits: the edited prompt, its paraphrase, the questions near it; and the shares of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hiplora.editing.asking import BATCH_SIZE, answer_log_probs
from hiplora.editing.edits import CATEGORIES, Edit
from hiplora.editing.success import EditOutcome, evaluate_edits

ALL = "all"


@dataclass(frozen=True)
class EditRecord:
    """One edit's outcome. `index` is its place among the edits of the run.

    `neighbours_kept` says of each question near the edit whether its true answer is likelier than the edit's new one.
    """

    index: int
    category: str
    asked: EditOutcome
    paraphrased: EditOutcome
    neighbours_kept: tuple[bool, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the record for a JSON file."""
        return {
            "index": self.index,
            "category": self.category,
            "asked": _outcome(self.asked),
            "paraphrased": _outcome(self.paraphrased),
            "neighbours_kept": list(self.neighbours_kept),
        }


def measure_edits(
    model: nn.Module, tokenizer: Any, edits: Mapping[int, Edit], batch_size: int = BATCH_SIZE
) -> list[EditRecord]:
    """Ask `model` about some edits of a run, given by their index; records come in the same order."""
    chosen = list(edits.values())
    asked = evaluate_edits(model, tokenizer, chosen, batch_size=batch_size)
    again = evaluate_edits(model, tokenizer, chosen, paraphrase=True, batch_size=batch_size)
    kept = _neighbours(model, tokenizer, chosen, batch_size)
    return [
        EditRecord(index, edit.category, one, other, near)
        for (index, edit), one, other, near in zip(edits.items(), asked, again, kept, strict=True)
    ]


def summarise(records: Sequence[EditRecord]) -> dict[str, dict[str, float]]:
    """Return, for all edits and for each category that occurs, how many there are and the shares in per cent.

    `success` is the paper's (exact or preferred), `preferred` and `exact` its two ways; `paraphrase_…` the same on the
    paraphrase; `neighbours_kept` the mean over edits of the share of their neighbours, where they have any.
    """
    groups = {ALL: list(records)}
    groups |= {name: [item for item in records if item.category == name] for name in CATEGORIES}
    return {name: _shares(group) for name, group in groups.items() if group}


def _shares(records: Sequence[EditRecord]) -> dict[str, float]:
    shares: dict[str, float] = {"edits": len(records)}
    for prefix, outcomes in (
        ("", [item.asked for item in records]),
        ("paraphrase_", [item.paraphrased for item in records]),
    ):
        for name in ("success", "preferred", "exact"):
            shares[prefix + name] = _percent(getattr(outcome, name) for outcome in outcomes)
    near = [item.neighbours_kept for item in records if item.neighbours_kept]
    if near:
        shares["neighbours_kept"] = sum(_percent(kept) for kept in near) / len(near)
    return shares


def _percent(values: Iterable[bool]) -> float:
    listed = list(values)
    return 100 * sum(listed) / len(listed)


def _neighbours(
    model: nn.Module, tokenizer: Any, edits: Sequence[Edit], batch_size: int
) -> list[tuple[bool, ...]]:
    pairs = [
        (near.prompt, answer)
        for edit in edits
        for near in edit.neighbours
        for answer in (near.answer, edit.new)
    ]
    sums = iter(answer_log_probs(model, tokenizer, pairs, batch_size))
    return [tuple(next(sums) > next(sums) for _ in edit.neighbours) for edit in edits]


def _outcome(outcome: EditOutcome) -> dict[str, Any]:
    return {
        "success": outcome.success,
        "preferred": outcome.preferred,
        "exact": outcome.exact,
        "log_prob_new": outcome.log_prob_new,
        "log_prob_old": outcome.log_prob_old,
        "written": outcome.continuation,
    }
