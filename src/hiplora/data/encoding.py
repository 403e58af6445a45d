"""From examples to token ids and labels.

Only responses are learned, unless the recipe says otherwise. A prompt keeps the tokens that the model will see when it
is prompted; whatever is cut or left out is counted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hiplora.data.examples import Example
from hiplora.errors import DataError

IGNORED = -100  # label of a token that is read but not learned
CHUNK = 1000  # examples per call of the tokenizer

Tokens = tuple[list[int], list[int]]  # token ids, labels


@dataclass
class EncodingReport:
    """Counts of what became of the examples."""

    examples: int = 0
    sequences: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    truncated: int = 0  # responses cut at their end
    left_out: int = 0  # the prompt alone fills max_length

    def warnings(self, max_length: int) -> list[str]:
        """Say what was cut or left out; empty if nothing was."""
        said = []
        if self.truncated:
            said.append(
                f"{self.truncated} of {self.examples} responses are cut at {max_length} tokens; raise train.max_length "
                "to keep them whole"
            )
        if self.left_out:
            said.append(
                f"{self.left_out} of {self.examples} rows are left out: the prompt alone has {max_length} tokens or "
                "more; raise train.max_length or shorten the prompts"
            )
        return said


def encode_examples(
    tokenizer: Any, examples: Sequence[Example], max_length: int
) -> tuple[list[dict[str, list[int]]], EncodingReport]:
    """Tokenize examples into rows of `input_ids` and `labels`, none longer than `max_length`.

    A response that is too long loses its end, a row without room for any of its response is left out, and plain text
    is cut into pieces.

    Raises:
        DataError: no row is left, or the tokenizer cannot format a conversation.
    """
    report = EncodingReport(examples=len(examples))
    rows = []
    for start in range(0, len(examples), CHUNK):
        chunk = examples[start : start + CHUNK]
        for example, tokens in zip(chunk, _encode(tokenizer, chunk), strict=True):
            for ids, labels in _cut(example, tokens, max_length, report):
                rows.append({"input_ids": ids, "labels": labels})
                report.tokens += len(ids)
                report.learned_tokens += _learned(labels)
    report.sequences = len(rows)
    if not rows:
        raise DataError(
            f"none of the {len(examples)} rows has room for its response in {max_length} tokens; raise train.max_length"
        )
    return rows, report


def encode_example(tokenizer: Any, example: Example) -> Tokens:
    """Tokenize one example at its full length: (input_ids, labels)."""
    return _encode(tokenizer, [example])[0]


def _learned(labels: Sequence[int]) -> int:
    """Count the predicted tokens: the first of a sequence never is."""
    return sum(label != IGNORED for label in labels[1:])


def _cut(example: Example, tokens: Tokens, max_length: int, report: EncodingReport) -> Iterator[Tokens]:
    ids, labels = tokens
    if len(ids) <= max_length and _learned(labels):
        yield ids, labels
    elif not example.prompt and not example.messages:
        for start in range(0, len(ids), max_length):
            if len(piece := ids[start : start + max_length]) > 1:
                yield piece, list(piece)
    elif _learned(labels[:max_length]):
        report.truncated += 1
        yield ids[:max_length], labels[:max_length]
    else:
        report.left_out += 1


def _encode(tokenizer: Any, examples: Sequence[Example]) -> list[Tokens]:
    """Tokenize prompts and whole texts in two calls, conversations one by one."""
    plain = [example for example in examples if not example.messages]
    prompts = iter(_tokenize(tokenizer, [example.prompt for example in plain]))
    wholes = iter(_tokenize(tokenizer, [example.prompt + example.response for example in plain]))
    prefix = _prefix(tokenizer)
    return [
        _conversation(tokenizer, example)
        if example.messages
        else _join(tokenizer, prefix, next(prompts), next(wholes), example)
        for example in examples
    ]


def _join(tokenizer: Any, prefix: list[int], prompt: list[int], whole: list[int], example: Example) -> Tokens:
    """Join prompt and response; a response whose first token spans the boundary is tokenized by itself."""
    spans = whole[: len(prompt)] != prompt
    response = _tokenize(tokenizer, [example.response])[0] if spans else whole[len(prompt) :]
    end = tokenizer.eos_token_id
    if end is not None and response[-1:] != [end]:
        response = [*response, end]
    learned = prompt if example.learn_prompt else [IGNORED] * len(prompt)
    return prefix + prompt + response, [IGNORED] * len(prefix) + learned + response


def _tokenize(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def _prefix(tokenizer: Any) -> list[int]:
    """Return the special tokens that the tokenizer puts before a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts = range(len(full) - len(bare) + 1)
    return next((full[:start] for start in starts if full[start : start + len(bare)] == bare), [])


def _conversation(tokenizer: Any, example: Example) -> Tokens:
    """Encode a conversation by the chat template; assistant messages, their end of turn included, are learned."""
    template = tokenizer.chat_template
    if not template:
        raise DataError(
            "the data are conversations, but the model's tokenizer has no chat template; use a chat model, or give "
            "the rows as prompt and completion"
        )
    messages = [dict(message) for message in example.messages]
    if "{% generation" in template or "{%- generation" in template:
        encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        return ids, [token if learned else IGNORED for token, learned in zip(ids, mask, strict=True)]
    ids, labels = [], []
    for text, learned in _turns(tokenizer, messages):
        tokens = _tokenize(tokenizer, [text])[0]
        ids += tokens
        labels += tokens if learned else [IGNORED] * len(tokens)
    return ids, labels


def _turns(tokenizer: Any, messages: list[dict[str, str]]) -> Iterator[tuple[str, bool]]:
    """Split a rendered conversation into (text, is it learned) by rendering its beginnings."""

    def render(count: int, prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)

    full, done = render(len(messages)), 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(index, prompt=True), render(index + 1)
        if not (full.startswith(after) and after.startswith(before) and len(before) >= done):
            raise DataError(
                f"the model's chat template renders message {index + 1} differently when it is not the last, so the "
                "assistant's text cannot be found; mark it in the template with {% generation %}, or give the rows "
                "as prompt and completion"
            )
        yield before[done:], False
        yield after[len(before) :], True
        done = len(after)
    if full[done:]:
        yield full[done:], False
