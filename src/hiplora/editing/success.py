"""Whether a model states the new fact: by likelihood, the headline, and by what it writes."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hiplora.editing.asking import BATCH_SIZE, answer_length, answer_log_probs, continuations
from hiplora.editing.edits import Edit


@dataclass(frozen=True)
class EditOutcome:
    """One prompt's answer: log p(new) and log p(old), sums over the answer's tokens in nats, and the greedy text."""

    log_prob_new: float
    log_prob_old: float
    continuation: str
    new: str

    @property
    def preferred(self) -> bool:
        """The paper's criterion: log p(new) > log p(old), both teacher-forced."""
        return self.log_prob_new > self.log_prob_old

    @property
    def exact(self) -> bool:
        """The greedy continuation begins with the new answer, as whole words, after `normalise`."""
        return begins_with(self.continuation, self.new)

    @property
    def success(self) -> bool:
        """Success as the paper counts it (C.4): the output matches the new answer, or the new one is preferred."""
        return self.exact or self.preferred


@dataclass(frozen=True)
class EditScore:
    """Shares, in [0, 1], of prompts whose new answer is preferred, and is what the model writes."""

    preferred: float
    exact: float
    count: int


def evaluate_edits(
    model: nn.Module,
    tokenizer: Any,
    edits: Sequence[Edit],
    *,
    paraphrase: bool = False,
    batch_size: int = BATCH_SIZE,
) -> list[EditOutcome]:
    """Ask `model` each edit's prompt (or its paraphrase) and return the outcomes in order; dropout is off.

    Prompts are asked in batches of `batch_size`, of similar length.
    """
    prompts = [edit.paraphrase if paraphrase else edit.prompt for edit in edits]
    pairs = [
        (prompt, answer)
        for prompt, edit in zip(prompts, edits, strict=True)
        for answer in (edit.new, edit.old)
    ]
    sums = answer_log_probs(model, tokenizer, pairs, batch_size)
    written = continuations(model, tokenizer, prompts, answer_length(tokenizer, pairs), batch_size)
    return [
        EditOutcome(new, old, text, edit.new)
        for new, old, text, edit in zip(sums[::2], sums[1::2], written, edits, strict=True)
    ]


def score(outcomes: Sequence[EditOutcome]) -> EditScore:
    """Count successes by both criteria."""
    count = len(outcomes)
    return EditScore(
        sum(outcome.preferred for outcome in outcomes) / count,
        sum(outcome.exact for outcome in outcomes) / count,
        count,
    )


def begins_with(written: str, answer: str) -> bool:
    """Whether a text begins with an answer, as whole words, after `normalise`."""
    found, wanted = normalise(written), normalise(answer)
    return found == wanted or found.startswith(f"{wanted} ")


def normalise(text: str) -> str:
    """Lower case, no punctuation, no leading article, single spaces: the form in which answers are compared."""
    text = unicodedata.normalize("NFKC", text).casefold()
    words = re.sub(r"[^\w\s]|_", " ", text).split()
    return " ".join(words[1:] if words and words[0] in ("the", "a", "an") else words)
