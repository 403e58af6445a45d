"""What a model writes after prompts, how chat prompts are worded, and where two answers differ."""

import pytest
import torch

from hiplora.errors import ConfigError
from hiplora.evaluation.answers import changes, chat_prompt, continuations
from tests.tiny import tiny_llama, tiny_tokenizer


@torch.no_grad()
def test_answers_are_greedy_end_at_the_models_own_end_of_turn_and_do_not_depend_on_the_batch():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    prompts = ["In the summer", "A", "the market stands by"]
    alone = [continuations(model, tokenizer, [prompt], 8)[0] for prompt in prompts]
    assert continuations(model, tokenizer, prompts, 8, batch_size=2) == alone
    ids, written = tokenizer(prompts[0])["input_ids"], []
    for _ in range(8):
        written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
    assert alone[0] == tokenizer.decode(written, skip_special_tokens=True)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, written[0]]
    assert continuations(model, tokenizer, prompts[:1], 8) == [tokenizer.decode(written[:1])] != alone[:1]


def test_a_tokenizer_without_end_and_padding_tokens_writes_after_prompts_of_several_lengths():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    model.generation_config.eos_token_id = tokenizer.eos_token = tokenizer.pad_token = None
    prompts = ["abc", "defgh"]
    alone = [continuations(model, tokenizer, [prompt], 4)[0] for prompt in prompts]
    assert continuations(model, tokenizer, prompts, 4) == alone


def test_an_empty_prompt_needs_a_token_that_begins_a_text():
    with pytest.raises(ConfigError, match="a prompt is empty"):
        continuations(tiny_llama(), tiny_tokenizer(), ["", "a"], 4)


@pytest.mark.parametrize(
    ("base", "other", "marked"),
    [
        ("Berlin is the capital.", "Berlin is a capital.", [" a"]),
        ("the same words", "the same words", []),
        ("", " new words", [" new words"]),
        ("one two", "one two three\n", [" three\n"]),
    ],
)
def test_changes_are_runs_of_words_and_joined_they_are_the_text(base, other, marked):
    runs = changes(base, other)
    assert "".join(text for text, _ in runs) == other
    assert [text for text, changed in runs if changed] == marked


def test_a_chat_prompt_is_the_templates_or_the_words_themselves_and_begins_once():
    tokenizer = tiny_tokenizer()
    asked = [{"role": "user", "content": "Why?"}]
    assert chat_prompt(tokenizer, asked) == "[user]\nWhy?\n[assistant]\n"
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert chat_prompt(tokenizer, asked).startswith("<|bos|>")  # this tokenizer adds none itself
    tokenizer.chat_template = None
    assert chat_prompt(tokenizer, asked) == "Why?"


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{% if %}", "{{ a.__class__.x }}"])
def test_a_chat_template_that_fails_is_named(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=r"the model's chat template fails for the message 'Why\?' \("):
        chat_prompt(tokenizer, [{"role": "user", "content": "Why?"}])
