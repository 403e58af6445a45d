"""Tokens and labels: only responses are learned, prompts keep their own tokens, nothing is lost uncounted."""

import re
from pathlib import Path

import pytest
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import ByteLevel, TemplateProcessing
from transformers import PreTrainedTokenizerFast

from hiplora.chat_template import prepare_template
from hiplora.data.encoding import IGNORED, as_texts, encode_examples, shown
from hiplora.data.examples import Example
from hiplora.errors import DataError
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

PLAIN_TEMPLATE = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def with_bos():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 256)]
    )
    return tokenizer


def templated(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def encode_example(tokenizer, example):
    (row,), _ = encode_examples(tokenizer, [example], 1000)
    ids, labels = row["input_ids"], row["labels"]
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    return ids, labels


def learned(tokenizer, example):
    """The text that is learned, in pieces between what is not."""
    (row,), _ = encode_examples(tokenizer, [example], 10_000)
    return re.findall("⟦(.*?)⟧", shown(tokenizer, row), re.S)


def test_the_response_is_learned_with_its_end_and_the_prompt_where_that_is_asked(tokenizer):
    example, asked = Example("Say hi:", " hi"), Example("Say hi:", " hi", learn_prompt=True)
    assert tokenizer.decode(encode_example(tokenizer, example)[0]) == "Say hi: hi<|eos|>"
    assert learned(tokenizer, example) == [" hi<|eos|>"]
    assert encode_example(tokenizer, asked)[0] == encode_example(tokenizer, example)[0]
    assert learned(tokenizer, asked) == learned(with_bos(), asked) == ["Say hi: hi<|eos|>"]


@pytest.mark.parametrize("prompt", ["ab", "", "<|bos|>ab"])
def test_a_beginning_of_text_token_is_there_once_and_given_not_learned(prompt):
    ids, labels = encode_example(with_bos(), Example(prompt, "c"))
    assert (ids[0], ids.count(256), labels[0]) == (256, 1, IGNORED)


class Merging:
    """A tokenizer that joins `:` and a following space into one token, as byte-pair encodings do."""

    eos_token_id = 2

    def __call__(self, texts, add_special_tokens=True):
        if not isinstance(texts, str):
            return {"input_ids": [self(text)["input_ids"] for text in texts]}
        return {"input_ids": [1 if piece == "\0" else ord(piece) for piece in texts.replace(": ", "\0")]}


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
    tokenizer, talk = templated(template), Example("", "2", TALK)
    assert [piece.strip() for piece in learned(tokenizer, talk)] == ["1<|eos|>", "2<|eos|>"]
    whole = tokenizer.apply_chat_template(list(TALK), tokenize=False)
    assert tokenizer.decode(encode_example(tokenizer, talk)[0]) == whole
    unlearned = (*TALK[:2], {**TALK[2], "weight": 0}, *TALK[3:])
    for example in (Example("", "2", TALK, learn_from=4), Example("", "2", unlearned)):
        assert learned(tokenizer, example) == ["2<|eos|>"]


@pytest.mark.parametrize("trim", [False, True])
def test_a_token_across_the_end_of_the_prompt_is_split_also_where_offsets_are_trimmed_of_blanks(trim):
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĠH"]
    merging = Tokenizer(models.BPE(vocab={symbol: n for n, symbol in enumerate(symbols)}, merges=[("Ġ", "H")]))
    merging.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    merging.decoder = decoders.ByteLevel()
    merging.post_processor = ByteLevel(trim_offsets=trim)
    merging.add_special_tokens(["<|eos|>"])
    template = CHAT_TEMPLATE.replace("]\n", "]: ")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=merging, eos_token="<|eos|>", chat_template=template)
    talk = ({"role": "user", "content": "One?"}, {"role": "assistant", "content": "Hi"})
    assert learned(tokenizer, Example("", "Hi", talk)) == ["Hi<|eos|>"]


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
    rows, report = encode_examples(tokenizer, [Example("p" * 10, "r"), Example("p" * 9, "r")], 10)
    assert (len(rows), report.left_out, report.truncated) == (1, 1, 1)
    with pytest.raises(DataError, match="none of the 2 rows has room"):
        encode_examples(tokenizer, [Example("p" * 20, "r")] * 2, 10)


def test_long_text_is_cut_into_pieces_and_no_token_is_lost(tokenizer):
    text = "".join(chr(ord("a") + index % 26) for index in range(24))
    rows, report = encode_examples(tokenizer, [Example("", text)], 10)
    assert [len(row["input_ids"]) for row in rows] == [10, 10, 5]
    assert tokenizer.decode([token for row in rows for token in row["input_ids"]]) == text + "<|eos|>"
    assert all(row["labels"] == row["input_ids"] for row in rows)
    assert report.truncated == 0


CALL = {"type": "function", "function": {"name": "tide", "arguments": {"day": "Monday"}}}
TOOLS = ({"type": "function", "function": {"name": "tide", "parameters": {}}},)
TOOL_TEMPLATE = (
    "{% if tools %}tools:{% for t in tools %} {{ t.function.name }}{% endfor %}\n{% endif %}{% for m in messages %}"
    "[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}<call {{ c.function.name }}>{% endfor %}"
    "<|eos|>\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
# As Llama 3.2's: a message with the key is a call.
KEYED = TOOL_TEMPLATE.replace("m.tool_calls or []", "([m.tool_calls[0]] if 'tool_calls' in m else [])")
MARKED = "{% for m in messages %}[{{ m.role }}]{%-generation-%}{{ m.content }}{%-endgeneration-%}<|eos|>{% endfor %}"
BARE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [TOOL_TEMPLATE, KEYED])
def test_tools_and_calls_reach_the_template(template):
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    talk = ({"role": "user", "content": "When is the tide?"}, called)
    asked, tokenizer = Example("", "", talk, tools=TOOLS), templated(template)
    ids, _ = encode_example(tokenizer, asked)
    assert tokenizer.decode(ids).startswith("tools: tide[user]When is the tide?")
    assert learned(tokenizer, asked) == ["<call tide><|eos|>"]
    assert as_texts(tokenizer, asked) == ("tools: tide[user]When is the tide?<|eos|>\n[assistant]", "<call tide>")
    with pytest.raises(
        DataError, match=r"leaves out the tool calls of the conversation that begins 'When is the tide\?'"
    ):
        encode_example(tiny_tokenizer(), asked)


def test_an_end_of_turn_outside_the_marks_is_learned_too():
    """Marks without blanks around their name are seen; TALK has two answers."""
    template = MARKED.replace(
        "[{{ m.role }}]{%-generation-%}", "[{{ m.role }}]{% if m.role == 'assistant' %}{%-generation-%}"
    )
    template = template.replace("{%-endgeneration-%}", "{%-endgeneration-%}{% else %}{{ m.content }}{% endif %}")
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    assert learned(templated(template), Example("", "2", TALK)) == ["1<|eos|>", "2<|eos|>"]


def test_marks_that_begin_at_the_first_token_end_where_they_end_and_an_answer_without_an_end_is_said():
    talk = ({"role": "assistant", "content": "Hm?"}, {"role": "user", "content": "Go"})
    assert learned(templated(BARE), Example("", "Hm?", talk)) == ["Hm?"]
    _, report = encode_examples(templated(BARE), [Example("", "Hm?", talk)], 100)
    assert "1 of 1 conversations end on no end-of-turn token" in " ".join(report.warnings(100))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "no chat template"),
        ("{{ messages | length }}" + PLAIN_TEMPLATE, "renders message 3 differently"),
        ("{{ raise_exception('System role not supported') }}", "System role not supported.*into the user's first"),
        ("{% generation %}{% endgeneration %}{{ messages[0].content }}", "marks nothing to learn"),
    ],
)
def test_a_template_that_is_missing_refuses_rewrites_or_marks_nothing_is_named(template, said):
    with pytest.raises(DataError, match=said):
        encode_example(templated(template), Example("", "2", TALK))


def test_a_conversation_that_the_template_refuses_is_named_by_its_row_or_left_out():
    tokenizer = templated(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN_TEMPLATE
    )
    refused = Example("", "2", TALK, place="rows.jsonl, line 2")
    examples, bad = [Example("", "2", TALK[1:]), refused], []
    with pytest.raises(DataError, match=r"^rows\.jsonl, line 2: the model's chat template refuses .*no system"):
        encode_examples(tokenizer, examples, 1000)
    rows, report = encode_examples(tokenizer, examples, 1000, bad)
    assert (len(rows), report.examples, len(bad)) == (1, 1, 1)
    with pytest.raises(DataError, match=r"line 2: .*no system"):
        encode_examples(tokenizer, [refused], 1000, bad)


# The templates of published models that TRL brings; the pattern finds their special tokens.
STOCK = sorted(
    path for path in Path(trl.__file__).parent.glob("chat_templates/*.jinja") if "training" not in path.stem
)
SPECIAL = re.compile(r"<[|｜][^<>\s'\"]+[|｜]>|<turn\|>|<end_of_\w+>|</s>")


@pytest.mark.parametrize("turns", [2, 4])
@pytest.mark.parametrize("stock", STOCK, ids=lambda path: path.stem)
def test_published_templates_learn_each_answer_to_its_end_and_nothing_else(stock, turns):
    tokenizer = templated(stock.read_text(encoding="utf-8"))
    tokenizer.add_special_tokens({"additional_special_tokens": sorted({*SPECIAL.findall(tokenizer.chat_template)})})
    assert prepare_template(tokenizer)
    said = ["Who wrote it?", "Jane Austen did.", "And when?", "In 1813."][:turns]
    talk = tuple({"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, said, strict=False))
    answers = learned(tokenizer, Example("", said[-1], talk))
    assert len(answers) == turns // 2
    for answer, text in zip(said[1::2], answers, strict=True):
        # Thoughts, though none were had, and the channel of an answer are the model's own words.
        assert re.sub(r"final|to=user|</?think>|\s", "", SPECIAL.sub("", text)) == answer.replace(" ", "")
        assert text.endswith(tuple(SPECIAL.findall(text)[-1:]))


def sentencepiece():
    """A tokenizer as Llama 2's: a blank before every text, then blanks as part of words."""
    symbols = [*dict.fromkeys("▁abcdefghijklmnopqrstuvwxyz\n[]/INST"), "▁y", "▁ye", "▁yes", "</s>"]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "y"), ("▁y", "e"), ("▁ye", "s")]))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}"
        "{{ m.content }}</s>{% endif %}{% endfor %}"
    )
    return tokenizer


@pytest.mark.parametrize("said", ["yes", " yes"])
def test_an_answer_has_the_tokens_that_the_whole_has(said):
    tokenizer = sentencepiece()
    talk = ({"role": "user", "content": "is it"}, {"role": "assistant", "content": said})
    ids, labels = encode_example(tokenizer, Example("", said, talk))
    assert ids == tokenizer(f"[INST]is it[/INST]{said}</s>", add_special_tokens=False)["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens([label for label in labels if label != IGNORED])
    assert tokens == [*(["▁yes"] if said[0] == " " else "yes"), "</s>"]


def test_a_response_after_a_blank_gets_no_second_blank():
    tokenizer = sentencepiece()
    _, labels = encode_example(tokenizer, Example("is it ", "yes"))
    assert tokenizer.convert_ids_to_tokens([label for label in labels if label != IGNORED]) == [*"yes", "</s>"]
