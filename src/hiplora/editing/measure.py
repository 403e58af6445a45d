"""What a model says about edits, their neighbours and unrelated questions: success and locality (HiP-LoRA, C.4)."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import nn

from hiplora.editing.edits import CATEGORIES, Edit, Question
from hiplora.evaluation.answers import continuations
from hiplora.evaluation.likelihood import by_length, encode, response_log_probs
from hiplora.metrics import locality

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
    asked = zip(prompts, edits, strict=True)
    pairs = [(prompt, answer) for prompt, edit in asked for answer in (edit.new, edit.old)]
    sums = answer_log_probs(model, tokenizer, pairs)
    written = continuations(model, tokenizer, prompts, _answer_length(tokenizer, pairs))
    new, old = pd.Series(sums[::2]), pd.Series(sums[1::2])
    preferred, exact = (new > old).astype(int), _right(written, [edit.new for edit in edits])
    columns = {"success": preferred | exact, "preferred": preferred, "exact": exact}
    return pd.DataFrame({**columns, "log_prob_new": new, "log_prob_old": old, "written": written})


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
    shares = {"edits": len(records), **(100.0 * records[columns].mean()).to_dict()}
    near = [100 * sum(kept) / len(kept) for kept in records["neighbours_kept"] if kept]
    return shares | ({"neighbours_kept": sum(near) / len(near)} if near else {})


class Locality:
    """Unrelated questions, with what the bare base says to them: to be made before the first edit.

    `before` has a row a question: `written` (greedy), `correct` (begins with the true answer), and log-probabilities in
    nats: `log_prob` of the true answer, `edited_log_prob` of a new answer of an edit, where it does not belong.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, questions: Sequence[Question], edits: Sequence[Edit]):
        self.questions, self._tokenizer = questions, tokenizer
        self.targets = [_target(question, index, edits) for index, question in enumerate(questions)]
        self._length = _answer_length(tokenizer, [(item.prompt, item.answer) for item in questions])
        self.before = self._ask(model)

    def measure(self, model: nn.Module) -> pd.DataFrame:
        """Ask an edited model: the columns of `before`, and `unchanged`, 1 if it writes what the base did."""
        found = self._ask(model)
        return found.assign(unchanged=(found["written"] == self.before["written"]).astype(int))

    def summarise(self, answers: pd.DataFrame) -> dict[str, float | None]:
        """Return accuracy before and after, its change in points, and the share of unchanged answers, in per cent.

        `log_prob_change` is the mean change of the true answers' log-probability in nats, `edited_log_prob_change` of
        the edits' new answers.
        """
        before = self.before
        true, edited = (
            locality(before["correct"], answers["correct"], before[name], answers[name])
            for name in ("log_prob", "edited_log_prob")
        )
        return {
            "questions": len(answers),
            "accuracy_before": float(100 * before["correct"].mean()),
            "accuracy": float(100 * answers["correct"].mean()),
            "accuracy_change": true.accuracy_change,
            "unchanged": float(100 * answers["unchanged"].mean()),
            "log_prob_change": true.log_prob_change,
            "edited_log_prob_change": edited.log_prob_change,
        }

    def _ask(self, model: nn.Module) -> pd.DataFrame:
        prompts, answers = [item.prompt for item in self.questions], [item.answer for item in self.questions]
        written = continuations(model, self._tokenizer, prompts, self._length)
        pairs = list(zip(prompts * 2, answers + self.targets, strict=True))
        sums = answer_log_probs(model, self._tokenizer, pairs)
        columns = {"correct": _right(written, answers), "log_prob": sums[: len(prompts)]}
        return pd.DataFrame({**columns, "edited_log_prob": sums[len(prompts) :], "written": written})


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


def normalise(text: str) -> str:
    """Lower case, no punctuation, no leading article, single spaces: the form in which answers are compared."""
    words = re.sub(r"[^\w\s]|_", " ", unicodedata.normalize("NFKC", text).casefold()).split()
    return " ".join(words[1:] if words and words[0] in ("the", "a", "an") else words)


def _right(written: Sequence[str], answers: Sequence[str]) -> pd.Series:
    """Whether each text begins with its answer, as whole words, 0 or 1."""
    pairs = zip(written, answers, strict=True)
    return pd.Series([int(f"{normalise(text)} ".startswith(f"{normalise(answer)} ")) for text, answer in pairs])


def _answer_length(tokenizer: Any, pairs: Pairs) -> int:
    """How many tokens to generate so that each of these answers, and a little more, has room."""
    return max(len(encode(tokenizer, prompt, f" {answer}").scored) for prompt, answer in pairs) + EXTRA_TOKENS


def _target(question: Question, index: int, edits: Sequence[Edit]) -> str:
    """A new answer of an edit, each in turn, that is not the question's own answer."""
    news = [edit.new for edit in (*edits[index % len(edits) :], *edits)]
    return next((new for new in news if normalise(new) != normalise(question.answer)), edits[0].new)
