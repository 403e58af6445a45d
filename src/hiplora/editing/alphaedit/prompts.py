"""Prompts as AlphaEdit reads them: where the subject ends, and the texts that prompts are put behind."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hiplora.editing.asking import continuations
from hiplora.editing.edits import Edit
from hiplora.errors import ConfigError, DataError
from hiplora.evaluation.likelihood import Encoded, encode

_BEGINNINGS = ("The", "Therefore", "Because", "I", "You")


@dataclass(frozen=True)
class Located:
    """A prompt with an answer as tokens, and the position of the subject's last token."""

    encoded: Encoded
    subject: int


def locate(tokenizer: Any, edit: Edit, answer: str, prefix: str = "") -> Located:
    """Tokenize prefix, prompt and answer, and find the last token of the edit's subject.

    Raises:
        ConfigError: the tokenizer cannot say where its tokens stand.
        DataError: the subject does not stand in the prompt.
    """
    return _located(tokenizer, edit.subject, prefix, edit.prompt, answer)


def essence(tokenizer: Any, edit: Edit) -> Located:
    """Tokenize "<subject> is a", whose next token an edit should leave alone."""
    return _located(tokenizer, edit.subject, "", f"{edit.subject} is", "a")


def write_prefixes(model: nn.Module, tokenizer: Any, count: int, tokens: int) -> list[str]:
    """Return texts to put before a prompt: what the model writes after a few common words."""
    if not count:
        return []
    words = [_BEGINNINGS[index % len(_BEGINNINGS)] for index in range(count)]
    # A word that is used again writes on a little longer, so that no two texts are the same.
    texts = []
    for index, word in enumerate(words):
        (written,) = continuations(model, tokenizer, [word], tokens + index // len(_BEGINNINGS))
        texts.append(" ".join(f"{word}{written}".split()) + ". ")
    return texts


def until_subject(located: Sequence[Located]) -> list[list[int]]:
    """Return the tokens up to and with the subject's last one: all that its key and value depend on."""
    return [list(item.encoded.ids[: item.subject + 1]) for item in located]


def _located(tokenizer: Any, subject: str, prefix: str, prompt: str, answer: str) -> Located:
    start = prompt.casefold().rfind(subject.casefold())
    if not subject or start < 0:
        raise DataError(
            f"edit {prompt!r}: its subject {subject!r} does not stand in the prompt, where AlphaEdit looks for it; "
            "reword the prompt, or use another method"
        )
    end = len(prefix) + start + len(subject)
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            "the tokenizer does not say where its tokens stand in the text; AlphaEdit needs a fast one"
        )
    encoded = encode(tokenizer, prefix + prompt, f" {answer}")
    spans = tokenizer(prefix + prompt + f" {answer}", return_offsets_mapping=True)["offset_mapping"]
    last = max(i for i, (a, b) in enumerate(spans[: len(encoded.ids)]) if a < end and b > a)
    return Located(encoded, last)
