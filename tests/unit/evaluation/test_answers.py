"""What a model writes after prompts, with tokenizers that lack special tokens."""

import pytest

from hiplora.errors import ConfigError
from hiplora.evaluation.answers import continuations
from tests.tiny import tiny_llama, tiny_tokenizer


def test_a_tokenizer_without_end_and_padding_tokens_writes_after_prompts_of_several_lengths():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    model.generation_config.eos_token_id = tokenizer.eos_token = tokenizer.pad_token = None
    prompts = ["abc", "defgh"]
    alone = [continuations(model, tokenizer, [prompt], 4)[0] for prompt in prompts]
    assert continuations(model, tokenizer, prompts, 4) == alone


def test_an_empty_prompt_needs_a_token_that_begins_a_text():
    with pytest.raises(ConfigError, match="a prompt is empty"):
        continuations(tiny_llama(), tiny_tokenizer(), ["", "a"], 4)
