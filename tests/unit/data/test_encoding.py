"""Tokens and labels: only responses are learned, prompts keep their own tokens, nothing is lost uncounted."""

import pytest

from hiplora.data.encoding import IGNORED, encode_example, encode_examples
from hiplora.data.examples import Example
from hiplora.errors import DataError
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

PLAIN_TEMPLATE = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def learned(tokenizer, example):
    """The text that is learned, in pieces between what is not."""
    ids, labels = encode_example(tokenizer, example)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    pieces, current = [], []
    for token, label in zip(ids, labels, strict=True):
        if label == IGNORED:
            pieces, current = [*pieces, current] if current else pieces, []
        else:
            current.append(token)
    return [tokenizer.decode(piece) for piece in [*pieces, current] if piece]


def test_the_response_is_learned_with_its_end_and_the_prompt_is_not(tokenizer):
    ids, _ = encode_example(tokenizer, Example("Say hi:", " hi"))
    assert tokenizer.decode(ids) == "Say hi: hi<|eos|>"
    assert learned(tokenizer, Example("Say hi:", " hi")) == [" hi<|eos|>"]


def test_the_prompt_is_learned_too_where_that_is_asked(tokenizer):
    asked = Example("Say hi:", " hi", learn_prompt=True)
    assert learned(tokenizer, asked) == ["Say hi: hi<|eos|>"]
    assert encode_example(tokenizer, asked)[0] == encode_example(tokenizer, Example("Say hi:", " hi"))[0]
    assert learned(with_bos(), asked) == ["Say hi: hi<|eos|>"]


def test_plain_text_is_learned_whole(tokenizer):
    assert learned(tokenizer, Example("", "all of it")) == ["all of it<|eos|>"]


def with_bos():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 256)]
    )
    return tokenizer


def test_a_beginning_of_text_token_is_there_once_and_given_not_learned():
    ids, labels = encode_example(with_bos(), Example("ab", "c"))
    assert ids[0] == 256
    assert ids.count(256) == 1
    assert labels[0] == IGNORED
    ids, labels = encode_example(with_bos(), Example("", "c"))
    assert (ids[0], labels[0]) == (256, IGNORED)


class Merging:
    """A tokenizer that joins `:` and a following space into one token, as byte-pair encodings do."""

    eos_token_id = 2

    def __call__(self, texts, add_special_tokens=True):
        if isinstance(texts, str):
            return {"input_ids": self._one(texts)}
        return {"input_ids": [self._one(text) for text in texts]}

    def _one(self, text):
        return [1 if piece == "\0" else ord(piece) for piece in text.replace(": ", "\0")]


def test_a_prompt_keeps_its_own_tokens_where_the_response_would_merge_into_it():
    ids, labels = encode_example(Merging(), Example("a:", " b"))
    assert ids == [ord("a"), ord(":"), ord(" "), ord("b"), 2]
    assert labels == [IGNORED, IGNORED, ord(" "), ord("b"), 2]


TALK = (
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, PLAIN_TEMPLATE])
def test_all_that_the_assistant_says_is_learned_and_nothing_else(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    said = learned(tokenizer, Example("", "2", TALK))
    assert [piece.strip() for piece in said] == ["1<|eos|>", "2<|eos|>"]
    ids, _ = encode_example(tokenizer, Example("", "2", TALK))
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(list(TALK), tokenize=False)


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + PLAIN_TEMPLATE
    with pytest.raises(DataError, match="renders message 3 differently"):
        encode_example(tokenizer, Example("", "2", TALK))


def test_a_conversation_needs_a_chat_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        encode_example(tokenizer, Example("", "2", TALK))


def test_what_is_cut_and_left_out_is_counted_and_said(tokenizer):
    rows, report = encode_examples(
        tokenizer, [Example("p" * 5, "r" * 3), Example("p" * 5, "r" * 30), Example("p" * 20, "r")], 10
    )
    assert [len(row["input_ids"]) for row in rows] == [9, 10]
    assert rows[1]["labels"] == [IGNORED] * 5 + rows[1]["input_ids"][5:]
    assert (report.truncated, report.left_out, report.examples, report.sequences) == (1, 1, 3, 2)
    assert (report.tokens, report.learned_tokens) == (19, 4 + 5)
    said = " ".join(report.warnings(10))
    assert "1 of 3 responses are cut at 10 tokens" in said
    assert "1 of 3 rows are left out" in said


def test_a_prompt_that_fills_the_length_exactly_leaves_no_response(tokenizer):
    examples = [Example("p" * 10, "r"), Example("p" * 9, "r")]
    rows, report = encode_examples(tokenizer, examples, 10)
    assert (len(rows), report.left_out, report.truncated) == (1, 1, 1)


def test_long_text_is_cut_into_pieces_and_no_token_is_lost(tokenizer):
    text = "".join(chr(ord("a") + index % 26) for index in range(24))
    rows, report = encode_examples(tokenizer, [Example("", text)], 10)
    assert [len(row["input_ids"]) for row in rows] == [10, 10, 5]
    assert tokenizer.decode([token for row in rows for token in row["input_ids"]]) == text + "<|eos|>"
    assert all(row["labels"] == row["input_ids"] for row in rows)
    assert report.truncated == 0


def test_no_room_for_any_response_is_an_error(tokenizer):
    with pytest.raises(DataError, match="none of the 2 rows has room"):
        encode_examples(tokenizer, [Example("p" * 20, "r")] * 2, 10)
