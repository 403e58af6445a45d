"""Tiny random Llamas and a byte-level tokenizer, made on the spot: what most tests of a model run on."""

import contextlib
import json
import os
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 259  # 256 bytes and three special tokens
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '[' + message['role'] + ']\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|eos|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)


def tiny_llama(seed: int = 0, tie: bool = False, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Make a random Llama of about 90 thousand parameters: grouped-query attention, k and v half as wide as q.

    The global random state is left as it was.
    """
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "sdpa"}
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 2048}
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    config = LlamaConfig(**sizes, **heads, **tokens, tie_word_embeddings=tie)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return model.to(dtype).eval()


def tiny_mixture(kind: str = "mixtral", **changes):
    """Make a random mixture of experts (two layers, two of three experts a token) over the tokenizer's vocabulary."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 48}
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, **heads, **experts, **changes}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Make a fast tokenizer with one token per byte (id = rank in the byte-level alphabet), bos, eos and pad."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS, PAD])
    options = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "chat_template": CHAT_TEMPLATE}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=2048, **options)


def save_with_tokenizer(model, path: str | os.PathLike) -> Path:
    """Write a model and the byte-level tokenizer to `path`, as a folder that the commands load."""
    for part in (model, tiny_tokenizer()):
        part.save_pretrained(path)
    return Path(path)


def save_tiny(path: str | os.PathLike, seed: int = 0, tie: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """Write a tiny Llama with its tokenizer to `path`, as a folder that `from_pretrained` loads."""
    return save_with_tokenizer(tiny_llama(seed, tie, dtype), path)


@contextlib.contextmanager
def left_as_it_was(model):
    """Check that a block leaves a model its own parameters, bit for bit, with their flags, and its modules' modes."""
    parameters = {name: (p, p.requires_grad, p.grad, p.detach().clone()) for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    yield
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name for name, _ in model.named_parameters()} == set(parameters)
    for name, (parameter, flag, gradient, values) in parameters.items():
        assert model.get_parameter(name) is parameter, name
        assert parameter.requires_grad == flag, name
        assert parameter.grad is gradient, name
        assert torch.equal(parameter, values), name


def write_jsonl(path: str | os.PathLike, rows: list[dict]) -> Path:
    """Write one JSON object a line."""
    path = Path(path)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
