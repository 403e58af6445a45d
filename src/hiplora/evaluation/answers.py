"""What a model writes itself, greedily: answers before and after an adapter, and where they differ."""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hiplora.data.encoding import beginning
from hiplora.errors import ConfigError, first_line
from hiplora.evaluation.likelihood import by_length, can_pad, encode, end_tokens, eval_mode, pad_left, pad_token
from hiplora.evaluation.mounting import BASE, mounted
from hiplora.positions import position_limit


@torch.no_grad()
def continuations(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], length: int, batch_size: int = 64
) -> list[str]:
    """Return what the model, in eval mode, writes greedily after each prompt: `length` tokens, or what has room.

    ConfigError if a prompt fills the model's context, is no text, or is empty where a text begins without a token.
    """
    from transformers import GenerationConfig

    ends, pad = end_tokens(model, tokenizer), pad_token(tokenizer)
    greedy = GenerationConfig(
        max_new_tokens=length, do_sample=False, pad_token_id=pad, eos_token_id=sorted(ends) or None
    )
    if broken := next((prompt for prompt in prompts if prompt != prompt.encode(errors="ignore").decode()), None):
        raise ConfigError(f"the prompt {broken[:40]!a} is not UTF-8, or has half a character; write it again")
    if "" in prompts and not beginning(tokenizer):
        raise ConfigError("a prompt is empty, and the model's tokenizer begins a text with no token; write a prompt")
    encoded = [encode(tokenizer, prompt, " x") for prompt in prompts]
    rows = [example.ids[: example.scored[0]] for example in encoded]  # what an answer's likelihood is conditioned on
    lengths, device = [len(row) for row in rows], next(model.parameters()).device
    context = position_limit(model) or max(lengths, default=0) + length
    fitting = [index for index, prompt_length in enumerate(lengths) if prompt_length + length <= context]
    cut_short = [index for index, prompt_length in enumerate(lengths) if prompt_length + length > context]
    parts = by_length([lengths[index] for index in fitting], batch_size if can_pad(model, lengths) else 1)
    written: dict[int, str] = {}
    with eval_mode(model):
        for batch in [*([fitting[place] for place in part] for part in parts), *([index] for index in cut_short)]:
            ids, mask, _ = (tensor.to(device) for tensor in pad_left([rows[index] for index in batch], pad))
            if (room := context - ids.shape[1]) < 1:
                what = f"the prompt {prompts[batch[0]][:40]!r} has {ids.shape[1]} tokens with what came before it"
                raise ConfigError(f"{what}, and the model's context is {context}: shorten it")
            greedy.max_new_tokens = min(length, room)
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy)  # type: ignore[operator]
            texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
            written |= zip(batch, texts, strict=True)
    return [written[index] for index in range(len(prompts))]


def chat_prompt(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """Return the text that an assistant's answer follows: by the chat template, or the last message without one.

    ConfigError if the template fails.
    """
    if not tokenizer.chat_template:
        return messages[-1]["content"]
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program: it may raise anything
        raise ConfigError(
            f"the model's chat template fails for the message {str(messages[-1]['content'])[:40]!r} "
            f"({first_line(error)}); "
            "correct `chat_template` in its tokenizer's files, or remove it: prompts are then continued as text"
        ) from error
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if adds_bos else text


def side_by_side(
    model: nn.Module,
    tokenizer: Any,
    adapters: Mapping[str, str | Path],
    prompts: Sequence[str] | Mapping[str, Sequence[str]],
    length: int = 96,
) -> list[dict[str, str]]:
    """Return, for each prompt, the greedy answers of a bare model (`base`) and of each adapter on it, by name.

    `prompts` are the same for all, or given by name, as many for each. AdapterError if an adapter does not fit.
    """
    written = {}
    for name, folder in {BASE: None, **adapters}.items():
        with mounted(model, folder) as adapted:
            questions = prompts[name] if isinstance(prompts, Mapping) else prompts
            written[name] = continuations(adapted, tokenizer, questions, length)
    return [dict(zip(written, row, strict=True)) for row in zip(*written.values(), strict=True)]


def changes(base: str, other: str) -> list[tuple[str, bool]]:
    """Split `other` into runs of words, each with whether it differs from `base` there; joined, they are `other`."""
    base_words, words = (re.findall(r"\s*\S+|\s+$", text) for text in (base, other))
    matcher = difflib.SequenceMatcher(None, base_words, words, autojunk=False)
    runs = [("".join(words[start:end]), kind != "equal") for kind, _, _, start, end in matcher.get_opcodes()]
    return [(text, changed) for text, changed in runs if text]
