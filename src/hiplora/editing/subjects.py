"""What AlphaEdit reads and seeks at the last token of an edit's subject: layer inputs, and the value an edit needs."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hiplora.editing.measure import BATCH_SIZE
from hiplora.errors import ConfigError, DataError
from hiplora.evaluation.answers import continuations
from hiplora.evaluation.likelihood import Encoded, encode, pad_left

if TYPE_CHECKING:
    from hiplora.editing.alphaedit import AlphaEdit

_BEGINNINGS = ("The", "Therefore", "Because", "I", "You")
_ENOUGH = 5e-2  # mean negative log-likelihood of an answer, in nats, at which its search ends


@dataclass(frozen=True)
class Located:
    """A prompt with an answer as tokens, and the position of the subject's last token."""

    encoded: Encoded
    subject: int


def locate(tokenizer: Any, subject: str, prompt: str, answer: str) -> Located:
    """Tokenize a prompt and its answer, and find the last token of the subject.

    Raises:
        ConfigError: the tokenizer gives no offsets.
        DataError: the prompt does not contain the subject.
    """
    start = prompt.casefold().rfind(subject.casefold())
    if not subject or start < 0:
        raise DataError(
            f"edit {prompt!r}: its subject {subject!r} is not in the prompt, where AlphaEdit looks for it; "
            "reword the prompt, or use another method"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError("the tokenizer gives no offsets of its tokens; AlphaEdit needs a fast one")
    encoded, end = encode(tokenizer, prompt, f" {answer}"), start + len(subject)
    spans = tokenizer(f"{prompt} {answer}", return_offsets_mapping=True)["offset_mapping"]
    last = max(i for i, (a, b) in enumerate(spans[: len(encoded.ids)]) if a < end and b > a)
    return Located(encoded, last)


def write_prefixes(model: nn.Module, tokenizer: Any, count: int, tokens: int) -> list[str]:
    """Return texts to put before a prompt: what the model generates after a few common words."""
    texts = []
    for index in range(count):
        # A word that is used again goes on a little longer, so that no two texts are the same.
        again, place = divmod(index, len(_BEGINNINGS))
        word = _BEGINNINGS[place]
        (written,) = continuations(model, tokenizer, [word], tokens + again)
        texts.append(" ".join(f"{word}{written}".split()) + ". ")
    return texts


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
    prompts, plus the divergence of what follows "<subject> is a" from what followed before, plus a decay; the shift
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
    batch = _Batch.of(model, prompts, essences)
    start, base_next = batch.at_rest(model, block)
    shift = torch.zeros_like(start, requires_grad=True)
    optimizer = torch.optim.Adam([shift], lr=settings.value_lr)
    found, losses = torch.zeros_like(start), torch.full((len(start),), torch.inf, device=start.device)
    running = torch.ones(len(start), dtype=torch.bool, device=start.device)
    for step in range(settings.value_steps):
        nll, divergence = batch.losses(model, block, shift, base_next)
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
    """All prompts of some edits, then their essences, as one padded batch.

    `owner` is each row's edit, `subject` the position of its subject's end, `bare` the row of each edit's bare prompt;
    `labels` (prompts, kept logits) is -100 where nothing is scored; `essence_end` are positions among the kept logits.
    """

    inputs: dict[str, Any]
    owner: Int[Tensor, " rows"]
    subject: Int[Tensor, " rows"]
    bare: Int[Tensor, " edits"]
    labels: Int[Tensor, "prompts keep"]
    essence_end: Int[Tensor, " edits"]

    @classmethod
    def of(
        cls, model: nn.Module, prompts: Sequence[Sequence[Located]], essences: Sequence[Located]
    ) -> "_Batch":
        items = [item for group in prompts for item in group]
        inputs = _padded(model, [list(item.encoded.ids) for item in (*items, *essences)])
        width, device = inputs["input_ids"].shape[1], inputs["input_ids"].device
        owner = [index for index, group in enumerate(prompts) for _ in group] + list(range(len(prompts)))
        subject = [width - len(item.encoded.ids) + item.subject for item in (*items, *essences)]
        labels = torch.full((len(items), width), -100)
        for row, item in enumerate(items):
            for position in item.encoded.scored:
                at = width - len(item.encoded.ids) + position
                labels[row, at - 1] = item.encoded.ids[position]  # of the logits that predict it
        first = min(int((labels != -100).nonzero()[:, 1].min()), *subject[len(items) :])
        bare = [owner.index(edit) for edit in range(len(prompts))]
        return cls(
            {**inputs, "logits_to_keep": width - first},
            torch.tensor(owner, device=device),
            torch.tensor(subject, device=device),
            torch.tensor(bare, device=device),
            labels[:, first:].to(device),
            torch.tensor(subject[len(items) :], device=device) - first,
        )

    @torch.no_grad()
    def at_rest(
        self, model: nn.Module, block: str
    ) -> tuple[Float[Tensor, "edits d"], Float[Tensor, "edits v"]]:
        """The block's output at the subject of each bare prompt, and the log-probabilities after "<subject> is a"."""
        seen: list[Tensor] = []
        with _output(model, block, seen.append):
            logits = model(**self.inputs).logits
        return seen[0][self.bare, self.subject[self.bare]].float(), self._essence_log_probs(logits)

    def losses(
        self, model: nn.Module, block: str, shift: Tensor, base_next: Tensor
    ) -> tuple[Float[Tensor, " edits"], Float[Tensor, " edits"]]:
        """Each edit's mean negative log-likelihood a token over its prompts, and the divergence of its essence."""

        def shifted(hidden: Tensor) -> Tensor:
            rows, moved = torch.arange(len(self.owner), device=hidden.device), hidden.clone()
            moved[rows, self.subject] += shift[self.owner].to(hidden.dtype)
            return moved

        with _output(model, block, shifted):
            logits = model(**self.inputs).logits
        scored, owner = self.labels != -100, self.owner[: len(self.labels)]
        log_probs = logits[: len(self.labels)].float().log_softmax(-1)
        picked = log_probs.gather(2, self.labels.clamp(min=0)[..., None]).squeeze(2)
        rows = -(picked * scored).sum(1) / scored.sum(1)
        count = torch.bincount(owner, minlength=len(shift))
        nll = torch.zeros(len(shift), device=rows.device).index_add(0, owner, rows) / count
        now = self._essence_log_probs(logits)
        return nll, (now.exp() * (now - base_next)).sum(1)

    def _essence_log_probs(self, logits: Tensor) -> Float[Tensor, "edits v"]:
        rows = torch.arange(len(self.labels), len(self.owner), device=logits.device)
        return logits[rows, self.essence_end].float().log_softmax(-1)


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
