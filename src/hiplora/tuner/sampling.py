"""Sample text from a model to calibrate it on: half of it begins at random, half are conversations."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from hiplora.chat_template import prepare_template
from hiplora.errors import ConfigError
from hiplora.files import cache_dir
from hiplora.models import knows_text
from hiplora.positions import looks_ahead
from hiplora.spectral import TensorStore, weight_fingerprint
from hiplora.tuner.experts import unrolled
from hiplora.tuner.moments import base_only
from hiplora.tuner.targets import check_unmerged

ROW_LENGTH = 256  # tokens of one calibration row
LONGEST_QUESTION = 64  # tokens after which a question that a model asks itself is answered
# Conversations without a chat template: what opens a question, the answer, and the next question.
QUESTIONS = [
    ("Question:", "\nAnswer:", "\n\nQuestion:"),
    ("Q:", "\nA:", "\n\nQ:"),
    ("### Instruction:\n", "\n### Response:\n", "\n\n### Instruction:\n"),
]
OWN_DATA = (
    "call hiplora.calibrate(model, config, run_model=...) with a function that runs the model over data of yours, with "
    "basis_sides='input' if it gives no logits; or set basis='weight'"
)
CACHES = ("past_key_values", "cache_params", "state")  # models' names for the cache of earlier tokens
_SAMPLED_AT_ONCE = 40
_WRAPPERS = re.compile(r"\.(base_layer|original_module)\b")  # that adapters add to the names of a model's weights
# Settings that say how a model was loaded or is used, not what it computes.
_BOOKKEEPING = re.compile(
    r"transformers_version|_name_or_path|architectures|(torch_)?dtype|use_cache|quantization_config|id2label|label2id"
    r"|.*token_ids?"
)
logger = logging.getLogger(__name__)
_FORMAT = 1  # raised when a measurement changes: old entries are then not found


class CalibrationStore(TensorStore):
    """Sampled text and measured eigenvectors, by the model, the text and the modules; in the user's cache."""

    def __init__(self, root: Path | None = None):
        super().__init__(cache_dir() / "calibration" if root is None else root)

    def path(self, *key: Any) -> Path:
        """Return the file of the entry that is made from `key`."""
        return super().path(_FORMAT, *key)


def model_fingerprint(model: nn.Module) -> str:
    """Return a hash of all of a model's own weights, and of the settings that decide what it computes with them.

    AdapterError: an adapter is merged into it.
    """
    for name, module in model.named_modules():
        check_unmerged(module, name)
    digest = hashlib.sha256()
    with unrolled(model):
        for name, parameter in model.named_parameters():
            if not any(part.startswith(("hiplora_", "lora_", "modules_to_save")) for part in name.split(".")):
                value = parameter.data
                if type(value).dequantize is not Tensor.dequantize:  # torchao's
                    value = value.dequantize()
                digest.update(f"{_WRAPPERS.sub('', name)} {weight_fingerprint(value, name)}\n".encode())
    if isinstance(config := getattr(model, "config", None), PreTrainedConfig):
        settings = _deciding(config.to_diff_dict())
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _deciding(settings: Any) -> Any:
    """Return a configuration's settings, nested ones too, without those that a model's outputs do not depend on."""
    if not isinstance(settings, dict):
        return settings
    return {str(key): _deciding(value) for key, value in settings.items() if not _BOOKKEEPING.fullmatch(str(key))}


def sampled_rows(
    model: Any,
    tokens: int,
    seed: int = 0,
    store: CalibrationStore | None = None,
    identity: str = "",
    tokenizer: Any = None,
) -> list[Tensor]:
    """Return about `tokens` token ids in rows, sampled from the base model, as `calibrate` measures on.

    Every other row is a conversation that the model writes itself, both sides of it: in the tokenizer's chat template,
    else questions and answers. The rest is text begun by a random token; all of it, where there is no tokenizer.

    Stored samples are read from `store`, by default the cache; `identity` is the `model_fingerprint`, if known;
    `tokenizer` None is the one of the model's folder or hub repository. ConfigError: the model is not a causal language
    model.
    """
    store, identity = store or CalibrationStore(), identity or model_fingerprint(model)
    check_causal(model)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = min(ROW_LENGTH, limit or ROW_LENGTH, tokens)
    count = -(-tokens // length)
    scripts = conversation_scripts(model, tokenizer or _own_tokenizer(model), length)
    recipe = [script[:3] for script in scripts]
    rows: list[Tensor] = []
    with base_only(model):
        for first in range(0, count, _SAMPLED_AT_ONCE):
            numbers = range(first, min(first + _SAMPLED_AT_ONCE, count))
            path = store.path("sampled", identity, length, seed, numbers.start, numbers.stop, recipe)
            if not path.is_file():
                logger.info(
                    "first run with this model: measuring what its layers are fed, on %d rows that it writes, once: "
                    "about %d min; kept in %s",
                    len(numbers),
                    max(1, round(_estimated_seconds(model, len(numbers), length) / 60)),
                    store.root,
                )
            sample = functools.partial(sample_rows, model, numbers, length, seed, scripts)
            tensors, _ = store.get_or_make(path, lambda sample=sample: ({"rows": sample().int()}, {}))  # type: ignore[misc]
            rows.extend(tensors["rows"].long())
    return rows


def _estimated_seconds(model: Any, rows: int, length: int) -> float:
    """Estimate how long it takes to sample rows, token by token, and to measure on them, forward and backward."""
    seconds, device = [], next(model.parameters()).device
    for shape in ((rows, 1), (rows, 1), (1, length)):  # the first warms up
        start = time.perf_counter()
        with torch.no_grad():
            float(model(input_ids=torch.zeros(shape, dtype=torch.long, device=device)).logits[0, -1, 0])
        seconds.append(time.perf_counter() - start)
    return length * seconds[1] + 3 * rows * seconds[2]


class Script(NamedTuple):
    """How two sides take turns in a row: token ids before the first turn, before a reply, and before a new turn."""

    opening: list[int]
    reply: list[int]
    again: list[int]
    ends: Callable[[int], bool]  # whether a sampled token ends a turn


def conversation_scripts(model: Any, tokenizer: Any, length: int) -> list[Script]:
    """Return the conversations that rows follow: the chat template's, else `QUESTIONS`; none without a tokenizer."""
    if tokenizer is None or not knows_text(tokenizer):
        return []
    vocabulary, begin, special_ids = _vocabulary(model)
    special = {*special_ids, *tokenizer.all_special_ids}
    begin = begin if begin == tokenizer("x")["input_ids"][:1] else []
    texts, ends = QUESTIONS, lambda token: token in special or "\n" in tokenizer.decode([token])
    if tokenizer.chat_template is not None and (chat := _chat_pieces(tokenizer)) is not None:
        texts, ends, begin = [chat], special.__contains__, []
    pieces = [[tokenizer(part, add_special_tokens=False)["input_ids"] for part in text] for text in texts]
    scripts = [Script(begin + opening, reply, again, ends) for opening, reply, again in pieces]
    short = [script for script in scripts if len(script.opening) < length / 2]
    return [script for script in short if max(script.opening + script.reply + script.again) < vocabulary]


def _chat_pieces(tokenizer: Any) -> tuple[str, str, str] | None:
    """Return a chat template's text before the user's first turn, between the turns, and before the next one."""
    turns = {"<1>": "user", "<2>": "assistant", "<3>": "user"}
    messages = [{"role": role, "content": mark} for mark, role in turns.items()]
    # Llama's templates write the date: with today's, text and measurements would be new every day.
    write = functools.partial(tokenizer.apply_chat_template, tokenize=False, date_string="26 Jul 2024")
    try:
        text, prompt = write(messages), write(messages[:1], add_generation_prompt=True)
        opening, reply = prompt.split("<1>")
        return opening, reply, text.split("<2>")[1].split("<3>")[0]
    except Exception:  # jinja2's errors, or a template that does not have these parts
        return None


def _own_tokenizer(model: Any) -> Any:
    """Return the tokenizer of the folder or hub name that a model was loaded from, if this machine has it."""
    if not (name := getattr(model, "name_or_path", "")):
        return None
    with contextlib.suppress(Exception):  # whatever transformers raises for a model without one
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        return tokenizer if prepare_template(tokenizer) else None
    return None


@torch.no_grad()
def check_causal(model: Any) -> None:
    """Check that text can be sampled from a model: that it predicts the next token, and looks at no later one."""
    config, problem = getattr(model, "config", None), ""  # a dictionary, or of another library, outside transformers
    if getattr(config, "is_encoder_decoder", False) or not getattr(model, "can_generate", bool)():
        problem = "is not a causal language model"
    else:
        with base_only(model):
            ahead = looks_ahead(model)
        if ahead is not False:
            problem = (
                "looks at later tokens too, as for masked words" if ahead else "does not give a logit for every token"
            )
    if problem:
        raise ConfigError(
            f"{type(model).__name__} {problem}, so no calibration text can be sampled from it; {OWN_DATA}"
        )


@torch.no_grad()
def sample_rows(
    model: nn.Module, rows: range, length: int, seed: int = 0, scripts: Sequence[Script] = ()
) -> Int[Tensor, "rows length"]:
    """Sample rows of token ids from a causal language model, at temperature 1.

    Odd rows follow the `scripts`, if any; the others begin with a random token. A row depends on the model, the seed
    and its own number only. Tokens that end a text are drawn only to end a turn, so every row has `length` tokens.
    """
    vocabulary, begin, special_ids = _vocabulary(model)
    device = next(model.parameters()).device
    special = torch.tensor([token for token in special_ids if token < vocabulary], dtype=torch.long)
    choices = torch.ones(vocabulary, dtype=torch.bool).index_fill_(0, special, False).nonzero().flatten()
    writers, draws = [], torch.empty(len(rows), length, dtype=torch.float64)
    for index, row in enumerate(rows):
        # torch's generator takes 32 bits of a seed; the multiplier is odd, so seeds share no run of rows.
        generator = torch.Generator().manual_seed((seed * 0x9E3779B1 + row) % 2**32)
        first = int(choices[torch.randint(len(choices), (1,), generator=generator)])
        script = scripts[row // 2 % len(scripts)] if scripts and row % 2 else None
        writers.append(_Writer(script, begin if script is None else [], first))
        torch.rand(length, generator=generator, out=draws[index])
    special, draws = special.to(device), draws.to(device)
    ids, cache = torch.empty(len(rows), 0, dtype=torch.long, device=device), None
    sampled = [0] * len(rows)  # nothing is sampled for the first position
    for position in tqdm(range(length), desc="sampling", delay=2, leave=False, disable=None):
        step = [writer.next(token) for writer, token in zip(writers, sampled, strict=True)]
        ids = torch.cat([ids, torch.tensor(step, device=device)[:, None]], dim=1)
        if position == length - 1:
            break
        logits, cache = next_logits(model, ids, cache)
        if position == 0:
            reserve(cache, length)
        open_turn = torch.tensor([not writer.may_end for writer in writers], device=device)
        logits = logits[:, :vocabulary].float()
        logits[:, special] = logits[:, special].masked_fill(open_turn[:, None], -torch.inf)
        cumulative = logits.softmax(-1).double().cumsum(-1)
        tokens = torch.searchsorted(cumulative, draws[:, position, None] * cumulative[:, -1:], right=True)
        sampled = tokens.clamp_max(vocabulary - 1).flatten().tolist()
    return ids.cpu()


class _ReservedLayer(DynamicLayer):
    """A layer of transformers' cache in memory reserved for all steps; `DynamicLayer` is copied at each step."""

    keys: Tensor
    values: Tensor
    reserved: tuple[Tensor, Tensor]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        for memory, new in zip(self.reserved, (key_states, value_states), strict=True):
            memory[..., start:end, :] = new
        self.keys, self.values = (memory[..., :end, :] for memory in self.reserved)
        return self.keys, self.values


def reserve(cache: Any, length: int) -> None:
    """Reserve memory for `length` tokens in the plain layers of transformers' cache; other caches stay unchanged."""
    for layer in getattr(cache, "layers", ()):
        if type(layer) is DynamicLayer and layer.is_initialized:
            spare = (0, 0, 0, length - layer.keys.shape[-2])
            layer.reserved = tuple(nn.functional.pad(states, spare) for states in (layer.keys, layer.values))
            layer.__class__ = _ReservedLayer


class _Writer:
    """Writes one row: the next token of its script, if any, else the sampled token."""

    def __init__(self, script: Script | None, begin: list[int], first: int) -> None:
        self.script = script
        self.queue = [*begin, first] if script is None else list(script.opening)
        self.is_question, self.turn = True, 0  # whose turn it is, and how many of its tokens were sampled

    @property
    def may_end(self) -> bool:
        return self.script is not None and self.turn > 0

    def next(self, sampled: int) -> int:
        too_long = self.is_question and self.turn >= LONGEST_QUESTION
        if self.script is not None and self.turn and not self.queue and (too_long or self.script.ends(sampled)):
            self.queue = list(self.script.reply if self.is_question else self.script.again)
            self.is_question, self.turn = not self.is_question, 0
        if self.queue:
            return self.queue.pop(0)
        self.turn += 1
        return sampled


def next_logits(model: Any, ids: Int[Tensor, "rows length"], cache: Any) -> tuple[Tensor, Any]:
    """Return the logits of each row's next token, and the model's cache, if it has one."""
    accepted = inspect.signature(model.forward).parameters
    name = next((name for name in CACHES if name in accepted), "")
    options = {key: value for key, value in {"logits_to_keep": 1, "use_cache": False}.items() if key in accepted}
    if name:
        options |= {"use_cache": True, name: cache}
    output = model(input_ids=ids if cache is None else ids[:, -1:], **options)
    return output.logits[:, -1], getattr(output, name, None) if name else None


def _vocabulary(model: Any) -> tuple[int, list[int], list[int]]:
    """Return the number of tokens, the token that begins a text, if any, and all that begin, end or pad a text."""
    config = model.config.get_text_config()
    begin, size = getattr(config, "bos_token_id", None), config.vocab_size
    special: set[int] = set()
    for settings in (config, getattr(model, "generation_config", None)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(settings, name, None)
            if ids is not None:
                special |= {*ids} if isinstance(ids, (list, tuple)) else {ids}
    return size, [begin] if isinstance(begin, int) and begin < size else [], sorted(special)
