"""Whether a model states the new fact: by likelihood, the headline, and by what it writes."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hiplora.editing.edits import Edit
from hiplora.evaluation.likelihood import encode, pad_left, response_log_probs

_EXTRA_TOKENS = 3  # written beyond the longest answer, so that a match is seen to end there


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
        written, wanted = normalise(self.continuation), normalise(self.new)
        return written == wanted or written.startswith(f"{wanted} ")


@dataclass(frozen=True)
class EditScore:
    """Shares, in [0, 1], of prompts whose new answer is preferred, and is what the model writes."""

    preferred: float
    exact: float
    count: int


@torch.no_grad()
def evaluate_edits(
    model: nn.Module, tokenizer: Any, edits: Sequence[Edit], *, paraphrase: bool = False
) -> list[EditOutcome]:
    """Ask `model` each edit's prompt (or its paraphrase) and return the outcomes in order; dropout is off."""
    training = model.training
    model.eval()
    try:
        prompts = [edit.paraphrase if paraphrase else edit.prompt for edit in edits]
        answers = [
            encode(tokenizer, prompt, f" {answer}")
            for prompt, edit in zip(prompts, edits, strict=True)
            for answer in (edit.new, edit.old)
        ]
        sums = [row.double().sum().item() for row in response_log_probs(model, answers)]
        length = max(len(answer.scored) for answer in answers) + _EXTRA_TOKENS
        written = _continue(model, tokenizer, prompts, length)
    finally:
        model.train(training)
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


def normalise(text: str) -> str:
    """Lower case, no punctuation, no leading article, single spaces: the form in which answers are compared."""
    text = unicodedata.normalize("NFKC", text).casefold()
    words = re.sub(r"[^\w\s]|_", " ", text).split()
    return " ".join(words[1:] if words and words[0] in ("the", "a", "an") else words)


def _continue(model: nn.Module, tokenizer: Any, prompts: Sequence[str], length: int) -> list[str]:
    """Greedy continuations of `length` tokens, without special tokens."""
    from transformers import GenerationConfig

    ids = [_prompt_ids(tokenizer, prompt) for prompt in prompts]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    device = next(model.parameters()).device
    inputs, mask, _ = (tensor.to(device) for tensor in pad_left(ids, pad))
    greedy = GenerationConfig(
        max_new_tokens=length, do_sample=False, pad_token_id=pad, eos_token_id=tokenizer.eos_token_id
    )
    output = model.generate(input_ids=inputs, attention_mask=mask, generation_config=greedy)  # type: ignore[operator]
    return tokenizer.batch_decode(output[:, inputs.shape[1] :], skip_special_tokens=True)


def _prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The tokens before an answer, the same as the likelihoods are conditioned on."""
    encoded = encode(tokenizer, prompt, " x")
    return list(encoded.ids[: encoded.scored[0]])
