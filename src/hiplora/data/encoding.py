"""From examples to token ids and labels: only responses are learned, and whatever is cut or left out is counted."""

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise, takewhile
from typing import Any

from hiplora.data.examples import Example
from hiplora.errors import DataError, first_line

IGNORED = -100  # label of a token that is read but not learned
CHUNK = 1000  # examples per call of the tokenizer
MARK = re.compile(r"\{%-?\s*generation\b")
UNFINISHED = re.compile(r"<[^<>\s]*$")  # a token as <|im_end|> that a text breaks off

Tokens = tuple[list[int], list[int]]  # token ids, labels
Span = tuple[int, int]  # characters of a rendered conversation


@dataclass
class EncodingReport:
    """Counts of what became of the examples."""

    examples: int = 0
    conversations: int = 0  # of the examples
    sequences: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    truncated: int = 0  # responses cut at their end
    left_out: int = 0  # the prompt alone fills max_length
    endless: int = 0  # conversations whose learned text does not end on a special token

    def warnings(self, max_length: int) -> list[str]:
        """Return a warning for each kind of rows that are cut, left out, or may not teach the model to stop."""
        warnings = {
            "responses are cut at {} tokens; raise max_length, up to the model's context, to keep them "
            "whole": self.truncated,
            "rows are left out: the prompt alone has {} tokens or more; raise max_length or shorten the "
            "prompts": self.left_out,
            "conversations end on no end-of-turn token, so the model will not learn to stop; put it inside "
            "{{% generation %}} in the chat template, or see what is learned with --preview": self.endless,
        }
        return [f"{n} of {self.examples} {text.format(max_length)}" for text, n in warnings.items() if n]


def encode_examples(
    tokenizer: Any, examples: Sequence[Example], max_length: int, bad: list[str] | None = None
) -> tuple[list[dict[str, list[int]]], EncodingReport]:
    """Tokenize examples into rows of `input_ids` and `labels`, none longer than `max_length`.

    A response that is too long loses its end, a row without room for any of its response is left out, and plain text
    is cut into pieces. Raises DataError if no row is left, or the tokenizer cannot format a conversation; where `bad`
    takes such conversations, they are left out.
    """
    report, rows = EncodingReport(examples=len(examples)), []
    added_tokens = getattr(tokenizer, "added_tokens_decoder", {}).items()
    specials = {tokenizer.eos_token_id, *(index for index, token in added_tokens if token.special)}
    for start in range(0, len(examples), CHUNK):
        chunk = examples[start : start + CHUNK]
        for example, tokens in zip(chunk, _encode(tokenizer, chunk), strict=True):
            if isinstance(tokens, DataError):
                if bad is None:
                    raise tokens
                bad.append(str(tokens))
                report.examples -= 1
                continue
            learned = [label for label in tokens[1] if label != IGNORED]
            report.conversations += bool(example.messages)
            report.endless += bool(example.messages) and learned[-1] not in specials
            for ids, labels in _cut(example, tokens, max_length, report):
                rows.append({"input_ids": ids, "labels": labels})
                report.tokens += len(ids)
                report.learned_tokens += _learned(labels)
    report.sequences = len(rows)
    if not rows:
        if bad and not report.examples:
            raise DataError(bad[0])
        what = f"none of the {report.examples} rows has room for its response in {max_length} tokens"
        raise DataError(f"{what}; raise max_length")
    return rows, report


def as_texts(tokenizer: Any, example: Example) -> tuple[str, str]:
    """Return the text before an example's last answer, and that answer without what ends its turn."""
    if not example.messages:
        return example.prompt, example.response
    text, spans = _render(tokenizer, example)
    before, answer = text[: spans[-1][0]], text[slice(*spans[-1])].rstrip()
    return before, answer.removesuffix(next(filter(answer.endswith, _specials(tokenizer)), ""))


def shown(tokenizer: Any, row: dict[str, list[int]]) -> str:
    """Return the text of an encoded row, with what is learned between ⟦ and ⟧."""
    text = ""
    for learned, group in groupby(zip(row["input_ids"], row["labels"], strict=True), lambda pair: pair[1] != IGNORED):
        piece = tokenizer.decode([token for token, _ in group])
        text += f"⟦{piece}⟧" if learned else piece
    return text


def _learned(labels: Sequence[int]) -> int:
    """Count the learned tokens; the first of a sequence is never predicted."""
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


def _encode(tokenizer: Any, examples: Sequence[Example]) -> Iterator[Tokens | DataError]:
    """Tokenize prompts and whole texts in two calls, conversations one by one; yield the error of one that fails."""
    plain = [example for example in examples if not example.messages]
    prompts = _tokenize(tokenizer, [example.prompt for example in plain])
    wholes = _tokenize(tokenizer, [example.prompt + example.response for example in plain])
    prefix, pairs = beginning(tokenizer), zip(prompts, wholes, strict=True)
    for example in examples:
        try:
            yield (
                _conversation(tokenizer, example)
                if example.messages
                else _join(tokenizer, prefix, *next(pairs), example)
            )
        except DataError as error:
            yield error


def _join(tokenizer: Any, prefix: list[int], prompt: list[int], whole: list[int], example: Example) -> Tokens:
    """Join prompt and response; a response whose first token spans the boundary is tokenized by itself."""
    splits_at_prompt = whole[: len(prompt)] == prompt
    response = whole[len(prompt) :] if splits_at_prompt else _continuation(tokenizer, example.response)
    end = tokenizer.eos_token_id
    if end is not None and response[-1:] != [end]:
        response = [*response, end]
    if (prompt + response)[: len(prefix)] == prefix:
        prefix = []  # the row's text begins with it
    learned = prompt if example.learn_prompt else [IGNORED] * len(prompt)
    return prefix + prompt + response, [IGNORED] * len(prefix) + learned + response


def _tokenize(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def _continuation(tokenizer: Any, text: str) -> list[int]:
    """Tokenize a text that follows another, without the blank that SentencePiece puts before a text."""
    anchor, whole, alone = _tokenize(tokenizer, ["\n", "\n" + text, text])
    return whole[len(anchor) :] if whole[: len(anchor)] == anchor else alone


def beginning(tokenizer: Any) -> list[int]:
    """Return the special tokens that the tokenizer puts before a text."""
    text = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    starts = range(len(whole) - len(text) + 1)
    return next((whole[:start] for start in starts if whole[start : start + len(text)] == text), [])


def _render(tokenizer: Any, example: Example) -> tuple[str, list[Span]]:
    """Render a conversation by `_render_checked`; a DataError names its row."""
    try:
        return _render_checked(tokenizer, example)
    except DataError as error:
        raise DataError(f"{example.place}: {error}" if example.place else str(error)) from error


def _render_checked(tokenizer: Any, example: Example) -> tuple[str, list[Span]]:
    """Render a conversation by `_render_for_training`; DataError if the template loses what should be learned."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        what = "the data are conversations, and the model's tokenizer has no chat template"
        raise DataError(f"{what}; use a chat model, or give the rows as prompt and completion")
    conversation = f"the conversation that begins {example.messages[0]['content'][:40]!r}"
    try:
        text, spans = _render_for_training(tokenizer, example)
    except (TemplateError, TypeError) as error:
        system = example.messages[0]["role"] == "system"
        way = "; put the system message's text into the user's first" if system else ""
        raise DataError(f"the model's chat template refuses {conversation} ({first_line(error)}){way}") from error
    if any(message.get("tool_calls") for message in example.messages):
        no_calls = [{key: message[key] for key in message if key != "tool_calls"} for message in example.messages]
        with contextlib.suppress(TemplateError, TypeError):  # a template that fails without the calls reads them
            if tokenizer.apply_chat_template(no_calls, list(example.tools) or None, tokenize=False) == text:
                what = f"the model's chat template leaves out the tool calls of {conversation}"
                raise DataError(f"{what}, so they would not be learned; use a model with tools, or write them as text")
    if not any(text[start:end].strip() for start, end in spans):
        what = f"the model's chat template marks nothing to learn in {conversation}"
        raise DataError(f"{what}; look for {{% generation %}} in it, or give the rows as prompt and completion")
    return text, spans


def _conversation(tokenizer: Any, example: Example) -> Tokens:
    """Encode a conversation by the chat template; assistant messages, their end of turn included, are learned.

    The whole is tokenized at once, as inference does, and cut by characters; piece by piece where a token reaches over
    the edge of a span.
    """
    text, spans = _render(tokenizer, example)
    edges = sorted({0, len(text), *(edge for span in spans for edge in span)})
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    ids, offsets = encoded["input_ids"], encoded.get("offset_mapping")
    if offsets is not None and not _token_spans_edge(offsets, edges):
        learned = [any(first <= start < end <= last for first, last in spans) for start, end in offsets]
        return ids, [token if is_learned else IGNORED for token, is_learned in zip(ids, learned, strict=True)]
    ids, labels = [], []
    for first, last in pairwise(edges):
        piece = _continuation(tokenizer, text[first:last]) if first else _tokenize(tokenizer, [text[:last]])[0]
        ids += piece
        labels += piece if (first, last) in spans else [IGNORED] * len(piece)
    return ids, labels


def _token_spans_edge(offsets: Sequence[Span], edges: Sequence[int]) -> bool:
    """Return whether a token has characters on both sides of an edge, its leading blank, which some trim, included."""
    ends = [end for _, end in offsets]
    starts = [min(start, previous) for (start, _), previous in zip(offsets, [0, *ends], strict=False)]
    return any(start < edge < end for start, end in zip(starts, ends, strict=True) for edge in edges)


def _render_for_training(tokenizer: Any, example: Example) -> tuple[str, list[Span]]:
    """Render a conversation; return its text and the spans of the assistant's messages to learn.

    Where the template ends no turn, or writes an answer in another way once more turns follow (without its thoughts,
    say), TRL's edition of it for training takes its place.
    """
    messages, tools = [dict(message) for message in example.messages], list(example.tools) or None
    template, specials, failure = tokenizer.get_chat_template(tools=tools), _specials(tokenizer), None
    render = functools.partial(_render_answers, tokenizer, messages, tools, specials)
    try:
        text, spans = render(template, bool(MARK.search(template)))
    except (DataError, TypeError) as error:
        text, spans, failure = "", [], error
    if failure or not all(text[start:end].endswith(specials) for start, end in spans):
        if edition := _training_edition(tokenizer, template):
            text, spans = render(edition, marked=False)  # its marks take in some of what a prompt gives
        elif failure:
            raise failure
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    learned = [index >= example.learn_from and messages[index].get("weight") != 0 for index in answers]
    if all(learned):
        return text, spans
    if len(spans) != len(answers):
        what = f"the model's chat template marks {len(spans)} answers of {len(answers)}"
        raise DataError(
            f"{what}, so those that are not to be learned cannot be told from the others; leave the row out"
        )
    return text, [span for span, is_learned in zip(spans, learned, strict=True) if is_learned]


@functools.lru_cache(maxsize=8)
def _training_edition(tokenizer: Any, template: str) -> str | None:
    """Return TRL's edition of a model's own template for training; None if it has none."""
    from trl.chat_template_utils import get_training_chat_template

    with contextlib.suppress(Exception):  # a template that TRL does not know, or that fails for its examples
        return get_training_chat_template(tokenizer) if template == tokenizer.chat_template else None
    return None


def _render_answers(
    tokenizer: Any, messages: list[Any], tools: Any, specials: tuple[str, ...], template: str, marked: bool
) -> tuple[str, list[Span]]:
    """Render a conversation by a template; return its text and the spans of the assistant's messages.

    In a `marked` template the spans are its {% generation %} marks, lengthened to the end of the turn where they leave
    it out; else beginnings of the conversation are rendered to find the turns.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    inputs = {"conversations": [messages], "tools": tools, "chat_template": template, **tokenizer.special_tokens_map}
    (text, *_), marks = render_jinja_template(**inputs, return_assistant_tokens_mask=marked)
    turns = functools.partial(_turns, tokenizer, messages, tools, specials, template, text)
    if not marked:
        return text, list(turns())
    spans = [(start, _turn_end(text, start, end, specials)) for start, end in marks[0] if end > start]
    if not all(text[start:end].endswith(specials) for start, end in spans):
        with contextlib.suppress(DataError, ValueError):
            spans = [(start, max(end, turn)) for (start, end), (_, turn) in zip(spans, turns(), strict=True)]
    return text, spans


def _turn_end(text: str, start: int, end: int, specials: tuple[str, ...]) -> int:
    """Return where a turn of the text ends: after its last special token, if only blanks follow that."""
    turn = text[start:end].rstrip()
    return start + len(turn) if turn.endswith(specials) else end


def _specials(tokenizer: Any) -> tuple[str, ...]:
    return tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)


def _turns(
    tokenizer: Any, messages: list[Any], tools: Any, specials: tuple[str, ...], template: str, full: str
) -> Iterator[Span]:
    """Find the assistant's turns in a rendered conversation by rendering its beginnings."""

    def render(count: int, prompt: bool = False) -> str:
        options = {"tokenize": False, "add_generation_prompt": prompt, "chat_template": template}
        return tokenizer.apply_chat_template(messages[:count], tools, **options)

    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        after = render(index + 1)
        header = render(1, prompt=True)[len(render(1)) :] if not index else ""  # nothing renders no messages
        before = render(index, prompt=True) if index else after[: after.find(header) + len(header)]
        start, body = len(before), after.rstrip()
        if not after.startswith(before):  # what a prompt opens, such as thoughts, an answer may do without
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False)))
            start = len(UNFINISHED.sub("", after[:same]))
        while body.endswith(specials):
            body = body.removesuffix(next(filter(body.endswith, specials))).rstrip()
        end = next(filter(full[len(body) :].startswith, specials), "")  # the last answer's may be another
        whole = after if full.startswith(after) else body + end
        opened = start == len(before) or start > len(render(index))
        if not (opened and full.startswith(whole) and (end or whole == after)):
            what = f"the model's chat template renders message {index + 1} differently when it is not the last"
            raise DataError(f"{what}; mark {{% generation %}} in it, or give the rows as prompt and completion")
        yield start, _turn_end(full, start, len(whole), specials)
