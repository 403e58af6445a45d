"""What AlphaEdit reads and seeks at the last token of an edit's subject: layer inputs, and the value an edit needs."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hiplora.editing.measure import BATCH_SIZE
from hiplora.errors import ConfigError, DataError
from hiplora.evaluation.answers import continuations
from hiplora.evaluation.likelihood import Encoded, encode, pad_left

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
    start = prompt.casefold().rfind(subject.casefold())
    if start < 0:
        raise DataError(
            f"edit {prompt!r}: its subject {subject!r} is not in the prompt, where AlphaEdit looks for it; "
            "reword the prompt, or use another method"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError("the tokenizer gives no offsets of its tokens; AlphaEdit needs a fast one")
    encoded, end = encode(tokenizer, prompt, f" {answer}"), start + len(subject)
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


def search_values(
    model: nn.Module,
    block: str,
    prompts: Sequence[Sequence[Located]],
    essences: Sequence[Located],
    settings: "AlphaEdit",
) -> tuple[Float[Tensor, "d edits"], list[float]]:
    """Find, for each edit, the output of `block` at the subject's last token under which the new answer is likely.

    A shift of that output is optimised with Adam: mean negative log-likelihood of the answer over the edit's
    prompts, plus the divergence of what follows the subject from what followed before, plus a decay; the shift
    is clamped to a share of the output's norm.

    Args:
        model: the model with the edits before these in it; none of its parameters should require gradients.
        block: module name of the block.
        prompts: for each edit its prompts with the new answer, the bare one first.
        essences: for each edit "<subject> is a".
        settings: the `value_…` settings.

    Returns:
        the outputs to reach, and the last loss of each edit, for its answer alone.

    Source: ROME (Meng et al. 2022), Sect. 3.1, as AlphaEdit and MEMIT use it.
    """
    items = [*(item for group in prompts for item in group), *essences]
    edits, count = len(prompts), len(items) - len(prompts)
    rows = [list(item.encoded.ids) for item in items]
    inputs = _padded(model, rows)
    width, device = inputs["input_ids"].shape[1], inputs["input_ids"].device
    owner = torch.tensor([i for i, group in enumerate(prompts) for _ in group] + list(range(edits)), device=device)
    subject = torch.tensor([width - len(item.encoded.ids) + len(item.ids) - 1 for item in items], device=device)
    labels = torch.full((count, width), -100, device=device)  # of the logits that predict them
    for row, item in enumerate(items[:count]):
        for position in item.encoded.scored:
            labels[row, width - len(item.encoded.ids) + position - 1] = item.encoded.ids[position]
    first = min(int((labels != -100).nonzero()[:, 1].min()), int(subject[count:].min()))
    inputs["logits_to_keep"], labels = width - first, labels[:, first:]
    scored = labels != -100

    def after_subject(logits: Tensor) -> Float[Tensor, "edits v"]:
        return logits[torch.arange(count, len(items)), subject[count:] - first].float().log_softmax(-1)

    def losses_at(shift: Tensor) -> tuple[Float[Tensor, " edits"], Float[Tensor, " edits"]]:
        """Each edit's mean negative log-likelihood a token over its prompts, and the divergence of its essence."""

        def shifted(hidden: Tensor) -> Tensor:
            moved = hidden.clone()
            moved[torch.arange(len(items)), subject] += shift[owner].to(hidden.dtype)
            return moved

        with _output(model, block, shifted):
            logits = model(**inputs).logits
        picked = logits[:count].float().log_softmax(-1).gather(2, labels.clamp(min=0)[..., None]).squeeze(2)
        each = -(picked * scored).sum(1) / scored.sum(1)
        total = torch.zeros(edits, device=device).index_add(0, owner[:count], each)
        now = after_subject(logits)
        return total / torch.bincount(owner[:count]), (now.exp() * (now - before)).sum(1)

    seen: list[Tensor] = []
    with torch.no_grad(), _output(model, block, seen.append):
        before = after_subject(model(**inputs).logits)
    bare = torch.tensor([owner.tolist().index(edit) for edit in range(edits)], device=device)
    start = seen[0][bare, subject[bare]].float()
    shift = torch.zeros_like(start, requires_grad=True)
    optimizer = torch.optim.Adam([shift], lr=settings.value_lr)
    found, losses = torch.zeros_like(start), torch.full((edits,), torch.inf, device=device)
    running = torch.ones(edits, dtype=torch.bool, device=device)
    for step in range(settings.value_steps):
        nll, divergence = losses_at(shift)
        losses = torch.where(running, nll.detach(), losses)
        found[running] = shift.detach()[running]
        running = running & (nll.detach() >= _ENOUGH)
        if step == settings.value_steps - 1 or not running.any():
            break
        decay = settings.value_decay * shift.norm(dim=1) / start.norm(dim=1) ** 2
        optimizer.zero_grad()
        (nll + settings.value_kl * divergence + decay).sum().backward()
        optimizer.step()
        with torch.no_grad():
            most = settings.value_clamp * start.norm(dim=1, keepdim=True)
            shift *= (most / shift.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0)
    return (start + found).T, losses.tolist()


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
