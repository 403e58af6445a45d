"""Keys and values at the subject's last token: what is there, and what should be there for an edit to hold."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hiplora.editing.alphaedit.prompts import Located
from hiplora.editing.alphaedit.settings import AlphaEdit
from hiplora.evaluation.likelihood import pad_left

_ENOUGH = 5e-2  # mean negative log-likelihood of an answer, in nats, at which its search ends


@torch.no_grad()
def subject_states(
    model: nn.Module, modules: Sequence[str], block: str, rows: Sequence[list[int]], batch_size: int = 64
) -> tuple[dict[str, Float[Tensor, "n rows"]], Float[Tensor, "d rows"]]:
    """Return what goes into some layers and what comes out of a block, at the last token of each row of tokens.

    One column a row, fp32.
    """
    inputs: dict[str, list[Tensor]] = {name: [] for name in modules}
    outputs: list[Tensor] = []
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kept=kept: kept.append(args[0][:, -1].float())
        )
        for name, kept in inputs.items()
    ]
    handles.append(
        model.get_submodule(block).register_forward_hook(
            lambda _, args, result: outputs.append(_hidden(result)[:, -1].float())
        )
    )
    try:
        for first in range(0, len(rows), batch_size):
            ids, mask, positions = _to(model, pad_left(rows[first : first + batch_size]))
            model(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1
            )
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(kept).T for name, kept in inputs.items()}, torch.cat(outputs).T


def search_values(
    model: nn.Module,
    block: str,
    prompts: Sequence[Sequence[Located]],
    essences: Sequence[Located],
    settings: AlphaEdit,
) -> tuple[Float[Tensor, "d edits"], list[float]]:
    """Find, for each edit, the output of `block` at the subject's last token under which the new answer is likely.

    A shift of that output is optimised with Adam: mean negative log-likelihood of the answer over the edit's
    prompts, plus the divergence of what follows "<subject> is a" from what followed before, plus a decay; the shift
    is clamped to a share of the output's norm.

    Args:
        model: the model, with the edits before these in it.
        block: module name of the block.
        prompts: for each edit its prompts with the new answer, the bare one first.
        essences: for each edit "<subject> is a".
        settings: the `value_…` settings.

    Returns:
        the outputs that should be there, and the last loss of each edit, of its answer alone.

    Source: ROME (Meng et al. 2022), Sect. 3.1, as AlphaEdit and MEMIT use it.
    """
    batch = _batch(model, prompts, essences)
    with _frozen(model):
        start, base_next = _at_rest(model, block, batch)
        shift = torch.zeros_like(start, requires_grad=True)
        optimizer = torch.optim.Adam([shift], lr=settings.value_lr)
        found, losses = torch.zeros_like(start), torch.full((len(start),), torch.inf, device=start.device)
        running = torch.ones(len(start), dtype=torch.bool, device=start.device)
        for step in range(settings.value_steps):
            nll, divergence = _losses(model, block, batch, shift, base_next)
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


@dataclass(frozen=True)
class _Batch:
    """All prompts of some edits as one padded batch. `owner` is each row's edit, `subject` the position of its end."""

    inputs: dict[str, Any]
    owner: Int[Tensor, " rows"]
    subject: Int[Tensor, " rows"]
    answers: int  # rows with an answer to score, before those without
    bare: Int[Tensor, " edits"]
    keep: int
    labels: Int[Tensor, "answers keep"]  # -100 where nothing is scored
    essence_end: Int[Tensor, " edits"]  # position of the last subject token among the kept logits


def _batch(model: nn.Module, prompts: Sequence[Sequence[Located]], essences: Sequence[Located]) -> _Batch:
    items = [item for group in prompts for item in group]
    rows = [list(item.encoded.ids) for item in (*items, *essences)]
    ids, mask, positions = _to(model, pad_left(rows))
    width, device = ids.shape[1], ids.device
    owner = [index for index, group in enumerate(prompts) for _ in group]
    owner += list(range(len(prompts)))
    subject = torch.tensor([width - len(item.encoded.ids) + item.subject for item in (*items, *essences)])
    keep = width - min(
        [width - len(item.encoded.ids) + item.encoded.scored[0] - 1 for item in items]
        + subject[len(items) :].tolist()
    )
    labels = torch.full((len(items), width), -100)
    for row, item in enumerate(items):
        for position in item.encoded.scored:
            at = width - len(item.encoded.ids) + position
            labels[row, at - 1] = item.encoded.ids[position]
    firsts = [sum(len(group) for group in prompts[:index]) for index in range(len(prompts))]
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions,
        "use_cache": False,
        "logits_to_keep": keep,
    }
    return _Batch(
        inputs,
        torch.tensor(owner, device=device),
        subject.to(device),
        len(items),
        torch.tensor(firsts, device=device),
        keep,
        labels[:, -keep:].to(device),
        (subject[len(items) :] - (width - keep)).to(device),
    )


@torch.no_grad()
def _at_rest(
    model: nn.Module, block: str, batch: _Batch
) -> tuple[Float[Tensor, "edits d"], Float[Tensor, "edits v"]]:
    """The block's output at the subject of each bare prompt, and the log-probabilities after "<subject> is a"."""
    seen: list[Tensor] = []
    handle = model.get_submodule(block).register_forward_hook(
        lambda _, args, result: seen.append(_hidden(result))
    )
    try:
        logits = model(**batch.inputs).logits
    finally:
        handle.remove()
    return seen[0][batch.bare, batch.subject[batch.bare]].float(), _essence_log_probs(logits, batch)


def _losses(
    model: nn.Module, block: str, batch: _Batch, shift: Tensor, base_next: Tensor
) -> tuple[Float[Tensor, " edits"], Float[Tensor, " edits"]]:
    """Each edit's mean negative log-likelihood a token over its prompts, and the divergence of its essence."""

    def hook(_: nn.Module, args: tuple, result: Any) -> Any:
        hidden = _hidden(result).clone()
        rows = torch.arange(len(batch.owner), device=hidden.device)
        hidden[rows, batch.subject] += shift[batch.owner].to(hidden.dtype)
        return (hidden, *result[1:]) if isinstance(result, tuple) else hidden

    handle = model.get_submodule(block).register_forward_hook(hook)
    try:
        logits = model(**batch.inputs).logits
    finally:
        handle.remove()
    scored = batch.labels != -100
    log_probs = logits[: batch.answers].float().log_softmax(-1)
    picked = log_probs.gather(2, batch.labels.clamp(min=0)[..., None]).squeeze(2)
    rows = -(picked * scored).sum(1) / scored.sum(1)
    owner = batch.owner[: batch.answers]
    count = torch.bincount(owner, minlength=len(shift))
    nll = torch.zeros(len(shift), device=rows.device).index_add(0, owner, rows) / count
    now = _essence_log_probs(logits, batch)
    return nll, (now.exp() * (now - base_next)).sum(1)


def _essence_log_probs(logits: Tensor, batch: _Batch) -> Float[Tensor, "edits v"]:
    rows = torch.arange(batch.answers, len(batch.owner), device=logits.device)
    return logits[rows, batch.essence_end].float().log_softmax(-1)


def _hidden(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _to(model: nn.Module, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    device = next(model.parameters()).device
    return tuple(tensor.to(device) for tensor in tensors)


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Have no parameter take a gradient inside the block, so that only what follows the shift is differentiated."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
