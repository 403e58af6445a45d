"""What AlphaEdit reads and seeks at the last token of an edit's subject: layer inputs, and the value an edit needs."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hiplora.editing.measure import BATCH_SIZE
from hiplora.errors import ConfigError, DataError
from hiplora.evaluation.answers import continuations
from hiplora.evaluation.likelihood import Encoded, encode, pad_left, response_log_probs

if TYPE_CHECKING:
    from hiplora.editing.alphaedit import AlphaEdit

BEGINNINGS = ("The", "Therefore", "Because", "I", "You")
_ENOUGH = 5e-2  # mean negative log-likelihood of an answer, in nats, at which its search ends


@dataclass(frozen=True)
class Located:
    """A prompt with an answer as tokens, and the tokens up to the subject's last one."""

    encoded: Encoded
    ids: list[int]


def locate(tokenizer: Any, subject: str, prompt: str, answer: str) -> Located:
    """Tokenize a prompt and its answer, and find the last token of the subject.

    Raises:
        ConfigError: the tokenizer gives no offsets.
        DataError: the prompt does not contain the subject.
    """
    places = [found.start() for found in re.finditer(re.escape(subject), prompt, re.IGNORECASE)] if subject else []
    if not places:
        raise DataError(
            f"edit {prompt!r}: its subject {subject!r} is not in the prompt, where AlphaEdit looks for it; "
            "reword the prompt, or use another method"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError("the tokenizer gives no offsets of its tokens; AlphaEdit needs a fast one")
    encoded, end = encode(tokenizer, prompt, f" {answer}"), places[-1] + len(subject)
    spans = tokenizer(f"{prompt} {answer}", return_offsets_mapping=True)["offset_mapping"]
    last = max(i for i, (a, b) in enumerate(spans[: len(encoded.ids)]) if a < end and b > a)
    return Located(encoded, list(encoded.ids[: last + 1]))


def write_prefixes(model: nn.Module, tokenizer: Any, count: int, tokens: int) -> list[str]:
    """Return texts to put before a prompt: what the model generates after a few common words."""
    words = BEGINNINGS[:count]
    written = [continuations(model, tokenizer, [word], tokens)[0] for word in words]
    return [" ".join(f"{word}{text}".split()) + ". " for word, text in zip(words, written, strict=True)]


@torch.no_grad()
def subject_states(
    model: nn.Module, modules: Sequence[str], block: str, rows: Sequence[list[int]]
) -> tuple[dict[str, Float[Tensor, "n rows"]], Float[Tensor, "d rows"]]:
    """Return inputs of layers and the output of a block at the last token of each row of tokens, one a column, fp32."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in modules}
    outputs: list[Tensor] = []
    with contextlib.ExitStack() as hooks:
        for name, kept in inputs.items():
            handle = model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, kept=kept: kept.append(args[0][:, -1].float())
            )
            hooks.callback(handle.remove)
        hooks.enter_context(_output(model, block, lambda hidden: outputs.append(hidden[:, -1].float())))
        for first in range(0, len(rows), BATCH_SIZE):
            model(**_padded(model, rows[first : first + BATCH_SIZE]), logits_to_keep=1)
    return {name: torch.cat(kept).T for name, kept in inputs.items()}, torch.cat(outputs).T


def search_value(
    model: nn.Module, block: str, prompts: Sequence[Located], essence: list[int], settings: "AlphaEdit"
) -> tuple[Float[Tensor, " d"], float]:
    """Find the output of `block` at an edit's subject under which the new answer is likely.

    A shift of that output is optimised with Adam: mean negative log-likelihood of the answer over the prompts, plus
    the divergence of what follows the subject from what followed before, plus a decay; the shift is clamped to a share
    of the output's norm.

    Args:
        model: the model with the edits before this in it; none of its parameters should require gradients.
        block: module name of the block.
        prompts: the edit's prompts with the new answer, the bare one first.
        essence: tokens up to the subject in "<subject> is a".
        settings: the `value_…` settings.

    Returns:
        the output to reach, and the last loss for the answer alone.

    Source: ROME (Meng et al. 2022), Sect. 3.1, as AlphaEdit and MEMIT use it.
    """
    examples = [item.encoded for item in prompts]
    places = [len(item.ids) - len(item.encoded.ids) - 1 for item in prompts]  # from the end: padding is on the left

    def log_probs(shift: Tensor) -> tuple[Tensor, Tensor]:
        """Return the answers' mean log-likelihood, and the log-probabilities of what follows the essence."""
        with _output(model, block, _shifted(shift, places)):
            answers = torch.stack([row.mean() for row in response_log_probs(model, examples)]).mean()
        with _output(model, block, _shifted(shift, [-1])):
            logits = model(**_padded(model, [essence]), logits_to_keep=1).logits
        return answers, logits[0, -1].float().log_softmax(-1)

    start = subject_states(model, (), block, [prompts[0].ids])[1][:, 0]
    shift = torch.zeros_like(start, requires_grad=True)
    optimizer = torch.optim.Adam([shift], lr=settings.value_lr)
    before: Tensor | None = None
    for step in range(settings.value_steps):
        answers, now = log_probs(shift)
        before = now.detach() if before is None else before
        if -answers < _ENOUGH or step == settings.value_steps - 1:
            break
        divergence = (now.exp() * (now - before)).sum()
        decay = settings.value_decay * shift.norm() / start.norm() ** 2
        optimizer.zero_grad()
        (settings.value_kl * divergence + decay - answers).backward()
        optimizer.step()
        with torch.no_grad():
            shift *= (settings.value_clamp * start.norm() / shift.norm().clamp(min=1e-12)).clamp(max=1.0)
    return start + shift.detach(), -answers.item()


def _shifted(shift: Tensor, places: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Add a shift to hidden states (rows, tokens, d), at one token of each row."""

    def handle(hidden: Tensor) -> Tensor:
        moved = hidden.clone()
        moved[range(len(places)), places] += shift.to(hidden.dtype)
        return moved

    return handle


@contextlib.contextmanager
def _output(model: nn.Module, block: str, handle: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Give a block's hidden states to `handle` at each pass; what it returns, if anything, takes their place."""

    def hook(_: nn.Module, args: tuple, result: Any) -> Any:
        changed = handle(result[0] if isinstance(result, tuple) else result)
        if changed is None:
            return None
        return (changed, *result[1:]) if isinstance(result, tuple) else changed

    registered = model.get_submodule(block).register_forward_hook(hook)
    try:
        yield
    finally:
        registered.remove()


def _padded(model: nn.Module, rows: Sequence[list[int]]) -> dict[str, Any]:
    device = next(model.parameters()).device
    ids, mask, positions = (tensor.to(device) for tensor in pad_left(rows))
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}
