"""What a model says about edits, their neighbours and unrelated questions: success and locality (HiP-LoRA, C.4)."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hiplora.editing.edits import CATEGORIES, Edit, Question
from hiplora.errors import AdapterError, DataError
from hiplora.evaluation.answers import continuations
from hiplora.evaluation.likelihood import by_length, encode, response_log_probs
from hiplora.metrics import locality
from hiplora.tuner import model_fingerprint

BATCH_SIZE = 64  # prompts at once
EXTRA_TOKENS = 3  # generated beyond the longest answer, to see whether a match ends there
ALL = "all"
SHARES = ("success", "preferred", "exact")
Pairs = Sequence[tuple[str, str]]


def evaluate_edits(
    model: nn.Module, tokenizer: Any, edits: Sequence[Edit], *, paraphrase: bool = False
) -> pd.DataFrame:
    """Ask `model` each edit's prompt, or its paraphrase, and return a row an edit, in order.

    Columns: `preferred`, the paper's criterion log p(new) > log p(old), both teacher-forced; `exact`, whether the
    greedy continuation begins with the new answer as whole words (`normalise`); `success`, either of the two; each 0 or
    1; `log_prob_new` and `log_prob_old`, sums over the answer's tokens in nats; `written`, the continuation.
    """
    prompts = [edit.paraphrase if paraphrase else edit.prompt for edit in edits]
    pairs = [
        (prompt, answer)
        for prompt, edit in zip(prompts, edits, strict=True)
        for answer in (edit.new, edit.old)
    ]
    sums = answer_log_probs(model, tokenizer, pairs)
    written = continuations(model, tokenizer, prompts, answer_length(tokenizer, pairs))
    found = pd.DataFrame({"log_prob_new": sums[::2], "log_prob_old": sums[1::2], "written": written})
    preferred = (found["log_prob_new"] > found["log_prob_old"]).astype(int)
    exact = [int(begins_with(text, edit.new)) for text, edit in zip(written, edits, strict=True)]
    found.insert(0, "exact", exact)
    found.insert(0, "preferred", preferred)
    found.insert(0, "success", preferred | found["exact"])
    return found


def measure_edits(model: nn.Module, tokenizer: Any, edits: Mapping[int, Edit]) -> pd.DataFrame:
    """Ask `model` about some edits of a run, given by their index; a row an edit.

    Columns: `index`, `category`, those of `evaluate_edits`, the same for the paraphrase as `paraphrase_…`, and
    `neighbours_kept`: of each question near the edit 1 if its true answer is likelier than the edit's new one, else 0.
    """
    chosen = list(edits.values())
    near = [
        (question.prompt, answer)
        for edit in chosen
        for question in edit.neighbours
        for answer in (question.answer, edit.new)
    ]
    sums = iter(answer_log_probs(model, tokenizer, near))
    named = pd.DataFrame({"index": list(edits), "category": [edit.category for edit in chosen]})
    named["neighbours_kept"] = [[int(next(sums) > next(sums)) for _ in edit.neighbours] for edit in chosen]
    asked = evaluate_edits(model, tokenizer, chosen)
    again = evaluate_edits(model, tokenizer, chosen, paraphrase=True).add_prefix("paraphrase_")
    return pd.concat([named, asked, again], axis=1)


def summarise(records: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Return, for all edits and for each category that occurs, the number of `edits` and shares in per cent.

    `success`, `preferred` and `exact` as in `evaluate_edits`, the same of the paraphrase; `neighbours_kept` is the mean
    over edits of the share of their neighbours, if they have any.
    """
    groups = {ALL: records} | {name: records[records["category"] == name] for name in CATEGORIES}
    return {name: _shares(group) for name, group in groups.items() if len(group)}


def _shares(records: pd.DataFrame) -> dict[str, float]:
    columns = [prefix + name for prefix in ("", "paraphrase_") for name in SHARES]
    shares: dict[str, float] = {"edits": len(records)}
    shares |= {name: float(100 * records[name].mean()) for name in columns}
    near = [100 * sum(kept) / len(kept) for kept in records["neighbours_kept"] if kept]
    return shares | ({"neighbours_kept": sum(near) / len(near)} if near else {})


@dataclass(frozen=True)
class Reference:
    """What the bare base says to unrelated questions, frozen before any edit.

    `answers` has a row a question: `written` (greedy, `length` tokens), `correct` (begins with the true answer), and
    the log-probabilities in nats of the true answer (`log_prob`) and of `targets` (`edited_log_prob`), new answers of
    edits that have nothing to do with the question. `base` is the fingerprint of the model's weights.
    """

    questions: tuple[Question, ...]
    targets: tuple[str, ...]
    answers: pd.DataFrame
    base: str
    length: int

    @classmethod
    def freeze(
        cls, model: nn.Module, tokenizer: Any, questions: Sequence[Question], edits: Sequence[Edit]
    ) -> "Reference":
        """Ask the bare base; to be called before the first edit.

        Raises:
            AdapterError: the model has an adapter on it.
            DataError: there are no questions or no edits, or a question is about the subject of an edit.
        """
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise AdapterError(
                "the model has an adapter on it; freeze the reference on the bare base, before editing"
            )
        if not questions or not edits:
            raise DataError(
                f"{len(questions)} questions and {len(edits)} edits; locality needs at least one of each"
            )
        edited = {edit.subject.casefold() for edit in edits}
        for question in questions:
            if question.subject.casefold() in edited:
                raise DataError(
                    f"question {question.prompt!r} is about {question.subject}, which is edited; leave one of them out"
                )
        targets = _targets(questions, edits)
        length = answer_length(tokenizer, [(item.prompt, item.answer) for item in questions])
        answers = _ask(model, tokenizer, questions, targets, length)
        return cls(tuple(questions), targets, answers, model_fingerprint(model), length)


def measure_locality(model: nn.Module, tokenizer: Any, reference: Reference) -> pd.DataFrame:
    """Ask an edited model the questions: the reference's columns, and `unchanged`, if it writes what the base did."""
    found = _ask(model, tokenizer, reference.questions, reference.targets, reference.length)
    found["unchanged"] = (found["written"] == reference.answers["written"]).astype(int)
    return found


def summarise_locality(reference: Reference, answers: pd.DataFrame) -> dict[str, float]:
    """Return accuracy before and after and the share of unchanged answers in per cent, the accuracy change in points.

    `log_prob_change` is the mean change of the true answers' log-probability in nats, `edited_log_prob_change` of
    the edits' new answers, where they do not belong.
    """
    before = reference.answers
    changes = {
        name: locality(before["correct"], answers["correct"], before[column], answers[column])
        for name, column in (("log_prob_change", "log_prob"), ("edited_log_prob_change", "edited_log_prob"))
    }
    return {
        "questions": len(answers),
        "accuracy_before": float(100 * before["correct"].mean()),
        "accuracy": float(100 * answers["correct"].mean()),
        "accuracy_change": changes["log_prob_change"].accuracy_change,
        "unchanged": float(100 * answers["unchanged"].mean()),
        **{name: found.log_prob_change for name, found in changes.items()},
    }


@torch.no_grad()
def answer_log_probs(model: nn.Module, tokenizer: Any, pairs: Pairs) -> list[float]:
    """Return log p(answer | prompt) of each `(prompt, answer)` in nats, summed over the answer's tokens.

    The answer follows the prompt after one space. The model is in eval mode meanwhile.

    Raises:
        DataError: an answer adds no token.
    """
    rows = [encode(tokenizer, prompt, f" {answer}") for prompt, answer in pairs]
    values, training = [0.0] * len(rows), model.training
    model.eval()
    try:
        for batch in by_length(range(len(rows)), [len(row.ids) for row in rows], BATCH_SIZE):
            found = response_log_probs(model, [rows[index] for index in batch])
            for index, row in zip(batch, found, strict=True):
                values[index] = row.double().sum().item()
    finally:
        model.train(training)
    return values


def answer_length(tokenizer: Any, pairs: Pairs) -> int:
    """Return how many tokens to generate so that each of these answers, and a little more, has room."""
    return max(len(encode(tokenizer, prompt, f" {answer}").scored) for prompt, answer in pairs) + EXTRA_TOKENS


def begins_with(written: str, answer: str) -> bool:
    """Whether a text begins with an answer, as whole words, after `normalise`."""
    found, wanted = normalise(written), normalise(answer)
    return found == wanted or found.startswith(f"{wanted} ")


def normalise(text: str) -> str:
    """Lower case, no punctuation, no leading article, single spaces: the form in which answers are compared."""
    words = re.sub(r"[^\w\s]|_", " ", unicodedata.normalize("NFKC", text).casefold()).split()
    return " ".join(words[1:] if words and words[0] in ("the", "a", "an") else words)


def _ask(
    model: nn.Module, tokenizer: Any, questions: Sequence[Question], targets: Sequence[str], length: int
) -> pd.DataFrame:
    prompts = [item.prompt for item in questions]
    written = continuations(model, tokenizer, prompts, length)
    pairs = [(item.prompt, item.answer) for item in questions] + list(zip(prompts, targets, strict=True))
    sums = answer_log_probs(model, tokenizer, pairs)
    return pd.DataFrame(
        {
            "correct": [
                int(begins_with(text, item.answer)) for text, item in zip(written, questions, strict=True)
            ],
            "log_prob": sums[: len(questions)],
            "edited_log_prob": sums[len(questions) :],
            "written": written,
        }
    )


def _targets(questions: Sequence[Question], edits: Sequence[Edit]) -> tuple[str, ...]:
    """For each question a new answer of an edit, in turn, that is not the question's own answer."""
    news = [edit.new for edit in edits]
    chosen = []
    for index, question in enumerate(questions):
        turn = (news[(index + step) % len(news)] for step in range(len(news)))
        chosen.append(next((new for new in turn if normalise(new) != normalise(question.answer)), news[0]))
    return tuple(chosen)
