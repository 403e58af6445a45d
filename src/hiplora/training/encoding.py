"""From examples to tokens and labels: what the model reads, and which of it it learns.

Only responses are learned, where there are any; prompts too, if the recipe says so. A response is tokenised so that its
prompt's tokens are the ones that the model will see when it is asked; nothing is cut or left out without being counted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hiplora.errors import DataError
from hiplora.training.data import Example

IGNORED = -100  # the label of a token that is read but not learned
CHUNK = 1000  # examples tokenised at a time: the fast tokenizers work on many at once

Tokens = tuple[list[int], list[int]]  # token ids, labels


@dataclass
class EncodingReport:
    """What became of the examples: counts, for people and for the provenance."""

    examples: int = 0
    sequences: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    truncated: int = 0  # responses cut at their end
    left_out: int = 0  # the prompt alone fills max_length: nothing of the response would be left
    split: int = 0  # plain texts cut into several sequences

    def as_dict(self) -> dict[str, int]:
        """Return the counts under their names."""
        return asdict(self)

    def warnings(self, max_length: int) -> list[str]:
        """Say what was cut or left out, in words; empty if nothing was."""
        said = []
        if self.truncated:
            said.append(
                f"{self.truncated} of {self.examples} responses are cut at {max_length} tokens; "
                "raise train.max_length to keep them whole"
            )
        if self.left_out:
            said.append(
                f"{self.left_out} of {self.examples} rows are left out: the prompt alone has {max_length} "
                "tokens or more; raise train.max_length or shorten the prompts"
            )
        return said


def encode_examples(
    tokenizer: Any, examples: Sequence[Example], max_length: int
) -> tuple[list[dict[str, list[int]]], EncodingReport]:
    """Tokenise examples into rows of `input_ids` and `labels`, none longer than `max_length`.

    A response that is too long loses its end; a row without room for any of its response is left out; plain
    text is cut into pieces. The report counts all three.

    Raises:
        DataError: no row is left, or the tokenizer cannot format a conversation.
    """
    report = EncodingReport(examples=len(examples))
    rows = []
    for start in range(0, len(examples), CHUNK):
        chunk = examples[start : start + CHUNK]
        for example, tokens in zip(chunk, _encode_chunk(tokenizer, chunk), strict=True):
            for ids, labels in _fit(example, tokens, max_length, report):
                rows.append({"input_ids": ids, "labels": labels})
                report.tokens += len(ids)
                report.learned_tokens += _learned(labels)
    report.sequences = len(rows)
    if not rows:
        raise DataError(
            f"none of the {len(examples)} rows has room for its response in {max_length} tokens; "
            "raise train.max_length"
        )
    return rows, report


def encode_example(tokenizer: Any, example: Example) -> Tokens:
    """Tokenise one example at its full length: (input_ids, labels)."""
    return _encode_chunk(tokenizer, [example])[0]


def _learned(labels: Sequence[int]) -> int:
    """Tokens that are predicted: the first of a sequence never is."""
    return sum(label != IGNORED for label in labels[1:])


def _fit(example: Example, tokens: Tokens, max_length: int, report: EncodingReport) -> Iterator[Tokens]:
    ids, labels = tokens
    if len(ids) <= max_length and _learned(labels):
        yield ids, labels
    elif example.is_text:
        report.split += len(ids) > max_length
        for start in range(0, len(ids), max_length):
            if len(piece := ids[start : start + max_length]) > 1:
                yield piece, list(piece)
    elif _learned(labels[:max_length]):
        report.truncated += 1
        yield ids[:max_length], labels[:max_length]
    else:
        report.left_out += 1


def _encode_chunk(tokenizer: Any, examples: Sequence[Example]) -> list[Tokens]:
    """Tokenise prompts and whole texts in two calls, conversations one by one."""
    plain = [example for example in examples if not example.messages]
    prompts = iter(_tokenise(tokenizer, [example.prompt for example in plain]))
    wholes = iter(_tokenise(tokenizer, [example.prompt + example.response for example in plain]))
    prefix = _prefix(tokenizer)
    return [
        _conversation(tokenizer, example)
        if example.messages
        else _join(tokenizer, prefix, next(prompts), next(wholes), example)
        for example in examples
    ]


def _join(tokenizer: Any, prefix: list[int], prompt: list[int], whole: list[int], example: Example) -> Tokens:
    """Prompt and response as one sequence that ends; the prompt keeps the tokens it has by itself.

    Where the two run together in the tokenizer's eyes (a merge over the boundary), the response is tokenised by
    itself: at inference the model reads the prompt's own tokens and goes on from there.
    """
    apart = whole[: len(prompt)] != prompt
    answer = _tokenise(tokenizer, [example.response])[0] if apart else whole[len(prompt) :]
    end = tokenizer.eos_token_id
    if end is not None and answer[-1:] != [end]:
        answer = [*answer, end]
    # Plain text is learned whole; its beginning-of-text token is given, not predicted.
    learned = prompt if example.learn_prompt else [IGNORED] * len(prompt)
    return prefix + prompt + answer, [IGNORED] * len(prefix) + learned + answer


def _tokenise(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def _prefix(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text (most often one, or none)."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []


def _conversation(tokenizer: Any, example: Example) -> Tokens:
    """A conversation through the chat template; what the assistant says, its end-of-turn included, is learned."""
    if not tokenizer.chat_template:
        raise DataError(
            "the data are conversations, but the model's tokenizer has no chat template; use a chat model, or "
            "give the rows as prompt and completion"
        )
    messages = [dict(message) for message in example.messages]
    if "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
        encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        return ids, [token if said else IGNORED for token, said in zip(ids, mask, strict=True)]
    ids, labels = [], []
    for text, said in _turns(tokenizer, messages):
        tokens = _tokenise(tokenizer, [text])[0]
        ids += tokens
        labels += tokens if said else [IGNORED] * len(tokens)
    return ids, labels


def _turns(tokenizer: Any, messages: list[dict[str, str]]) -> Iterator[tuple[str, bool]]:
    """Cut a rendered conversation into what the assistant says and what it is told, by rendering its beginnings."""

    def render(count: int, ask: bool = False) -> str:
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=ask)

    full, done = render(len(messages)), 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        told, said = render(index, ask=True), render(index + 1)
        if not (full.startswith(said) and said.startswith(told) and len(told) >= done):
            raise DataError(
                f"the model's chat template writes message {index + 1} of a conversation differently when it is "
                "not the last, so what the assistant says cannot be told apart; mark it in the template with "
                "{% generation %}, or give the rows as prompt and completion"
            )
        yield told[done:], False
        yield said[len(told) :], True
        done = len(said)
    if full[done:]:
        yield full[done:], False
