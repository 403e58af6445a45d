"""AlphaEdit (Fang et al. 2024): edits written into MLP weights, kept out of the directions that other text uses."""

import contextlib
import functools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from pydantic import ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from hiplora.adapters.update import Pair
from hiplora.editing.editors import PositiveFloat, WeightEditor, WeightEdits, block_of
from hiplora.editing.edits import Edit
from hiplora.editing.measure import BATCH_SIZE
from hiplora.errors import AdapterError, ConfigError, DataError, FactorSettingError
from hiplora.evaluation.answers import continuations
from hiplora.evaluation.likelihood import Encoded, can_pad, encode, pad_left, response_log_probs
from hiplora.spectral import MomentBasis
from hiplora.tuner import input_bases

BEGINNINGS = ("The", "Therefore", "Because", "I", "You")
_TARGET_LOSS = 5e-2  # mean negative log-likelihood of an answer, in nats, at which its search ends


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class AlphaEdit(WeightEdits):
    """AlphaEdit's settings; the defaults are those of its formula and of its authors' published configurations.

    `threshold` is that of `null_space`, `ridge` the weight of the update's size, `value_…` are for `search_value`;
    `value_lr` is in units of the hidden state (the authors': 0.5 for GPT-J, 0.1 for Llama 3): raise it if the record's
    `search_loss` stays high. Prompts are seen bare and behind `prefixes` generated texts of `prefix_tokens` tokens.
    """

    title: ClassVar[str] = "AlphaEdit"
    threshold: PositiveFloat = 0.02
    ridge: PositiveFloat = 1.0
    value_steps: Annotated[int, Field(ge=2)] = 25
    value_lr: PositiveFloat = 0.5
    value_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    value_kl: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0625
    value_clamp: PositiveFloat = 0.75
    prefixes: Annotated[int, Field(ge=0, le=len(BEGINNINGS))] = 5
    prefix_tokens: PositiveInt = 10


def null_space(basis: MomentBasis, threshold: float, name: str = "layer") -> Float[Tensor, "n n"]:
    """Return P, the projector on the directions in which `E[kkᵀ]` of the keys to preserve is below a threshold.

    `basis` is of the second moment of the keys, a layer's inputs; `threshold` an absolute eigenvalue (AlphaEdit, Sect.
    3.1). FactorError if no direction is below it, or more are above it than eigenvectors were kept.
    """
    n, kept = basis.vectors.shape
    above = int((basis.values >= threshold).sum())
    if above >= n or above > kept:
        raise FactorSettingError(
            f"layer {name}: {above} of {n} directions of its inputs are above the threshold {threshold}, at most "
            f"{min(n - 1, kept)} can be; raise threshold (the mean over the directions is {basis.values.mean():.2g})"
        )
    V = basis.vectors[:, :above].double()
    return torch.eye(n, dtype=torch.float64) - V @ V.T


def null_space_update(
    keys: Float[Tensor, "n e"],
    residual: Float[Tensor, "m e"],
    P: Float[Tensor, "n n"],
    former: Float[Tensor, "n n"] | None = None,
    ridge: float = 1.0,
) -> tuple[Float[Tensor, "e n"], Float[Tensor, "m e"]]:
    """Return `(A, B)` with `BA = Δ = R K₁ᵀ P (Kₚ Kₚᵀ P + K₁ K₁ᵀ P + ridge I)⁻¹`, in float64 (AlphaEdit, Eq. 14).

    Δ brings the values of the `keys` K₁ (the weight's inputs at the new edits) nearest to their targets, from which
    they are the `residual` R away, moves the keys of former edits (`former` is Kₚ Kₚᵀ) little, and leaves every key x
    with P x = 0 exactly where it was.
    """
    K = keys.double()
    moment = K @ K.T if former is None else K @ K.T + former.double()
    system = P @ moment + ridge * torch.eye(len(P), dtype=torch.float64, device=P.device)
    return torch.linalg.solve(system, P @ K).T, residual.double()


class Located(NamedTuple):
    """A prompt with an answer as tokens, and its `ids` up to the last one of the edit's subject."""

    encoded: Encoded
    ids: list[int]


def locate(tokenizer: Any, subject: str, prompt: str, answer: str) -> Located:
    """Tokenize a prompt and its answer, and find the subject; DataError if the prompt does not contain it."""
    starts = [match.start() for match in re.finditer(re.escape(subject), prompt, re.IGNORECASE)] if subject else []
    if not starts:
        raise DataError(
            f"edit {prompt!r}: its subject {subject!r} is not in the prompt, where AlphaEdit looks for it; "
            "reword the prompt, or use another method"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError("the tokenizer gives no offsets of its tokens; AlphaEdit needs a fast one")
    encoded, subject_end = encode(tokenizer, prompt, f" {answer}"), starts[-1] + len(subject)
    offsets = tokenizer(f"{prompt} {answer}", return_offsets_mapping=True)["offset_mapping"][: len(encoded.ids)]
    last = max(index for index, (start, end) in enumerate(offsets) if start < subject_end and end > start)
    return Located(encoded, list(encoded.ids[: last + 1]))


@torch.no_grad()
def subject_states(
    model: nn.Module, modules: Sequence[str], block: str, rows: Sequence[list[int]]
) -> tuple[dict[str, Float[Tensor, "n rows"]], Float[Tensor, "d rows"]]:
    """Return inputs of layers and the output of a block at the last token of each row of tokens, one a column, fp32."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in modules}
    outputs: list[Tensor] = []
    batch: Sequence[list[int]] = ()
    size = BATCH_SIZE if can_pad(model, [len(row) for row in rows]) else 1  # tried before the hooks

    def last(states: Tensor) -> Float[Tensor, "rows n"]:  # some models flatten the rows before their MLPs
        return states.reshape(len(batch), -1, states.shape[-1])[:, -1].float()

    with _output(model, block, lambda hidden: outputs.append(last(hidden))), contextlib.ExitStack() as hooks:
        for name, batches in inputs.items():
            hook = functools.partial(lambda batches, _, args: batches.append(last(args[0])), batches)
            hooks.callback(model.get_submodule(name).register_forward_pre_hook(hook).remove)
        for first in range(0, len(rows), size):
            batch = rows[first : first + size]
            _logits(model, batch)
    return {name: torch.cat(batches).T for name, batches in inputs.items()}, torch.cat(outputs).T


def search_value(
    model: nn.Module, block: str, prompts: Sequence[Located], essence: list[int], settings: AlphaEdit
) -> tuple[Float[Tensor, " d"], float]:
    """Find the output of `block` at an edit's subject under which the new answer is likely; return it and the loss.

    A shift of that output is optimised with Adam: mean negative log-likelihood of the answer over the edit's `prompts`,
    the bare one first, plus the divergence of what follows `essence` ("<subject> is a" up to the subject) from what
    followed before, plus a decay; the shift is clamped to a share of the output's norm. No parameter of the model may
    require gradients. Source: ROME (Meng et al. 2022), Sect. 3.1.
    """
    examples = [item.encoded for item in prompts]
    # Tried before the hooks, which must see no rows but the prompts.
    size = len(examples) if can_pad(model, [len(example.ids) for example in examples]) else 1
    positions = [len(item.ids) - len(item.encoded.ids) - 1 for item in prompts]  # from the end: padding is on the left

    def log_probs() -> tuple[Tensor, Tensor]:  # the answers' mean, and of what follows the essence
        rows: list[Tensor] = []
        for start in range(0, len(examples), size):
            shifted = functools.partial(_shifted, shift=shift, positions=positions[start : start + size])
            with _output(model, block, shifted):
                rows += response_log_probs(model, examples[start : start + size])
        with _output(model, block, lambda hidden: _shifted(hidden, shift, [-1])):
            return torch.stack([row.mean() for row in rows]).mean(), _logits(model, [essence])[0].log_softmax(-1)

    start = subject_states(model, (), block, [prompts[0].ids])[1][:, 0]
    shift = torch.zeros_like(start, requires_grad=True)
    optimizer = torch.optim.Adam([shift], lr=settings.value_lr)
    before: Tensor | None = None
    for step in range(settings.value_steps):
        answers, now = log_probs()
        before = now.detach() if before is None else before
        if -answers < _TARGET_LOSS or step == settings.value_steps - 1:
            break
        divergence = (now.exp() * (now - before)).sum()
        decay = settings.value_decay * shift.norm() / start.norm() ** 2
        optimizer.zero_grad()
        (settings.value_kl * divergence + decay - answers).backward()
        optimizer.step()
        with torch.no_grad():
            shift *= (settings.value_clamp * start.norm() / shift.norm().clamp(min=1e-12)).clamp(max=1.0)
    return start + shift.detach(), -answers.item()


def _shifted(hidden: Tensor, shift: Tensor, positions: Sequence[int]) -> Tensor:
    """Add a shift to hidden states (rows, tokens, d), at one token of each row."""
    shifted = hidden.clone()
    shifted[range(len(positions)), positions] += shift.to(hidden.dtype)
    return shifted


@contextlib.contextmanager
def _output(model: nn.Module, block: str, handle: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Give a block's hidden states to `handle` at each pass; what it returns, if anything, takes their place."""

    def hook(_: nn.Module, args: tuple, result: Any) -> Any:
        hidden, *rest = result if isinstance(result, tuple) else (result,)
        changed = handle(hidden)
        if changed is None:
            return None
        return (changed, *rest) if isinstance(result, tuple) else changed

    registered = model.get_submodule(block).register_forward_hook(hook)
    try:
        yield
    finally:
        registered.remove()


def _logits(model: nn.Module, rows: Sequence[list[int]]) -> Float[Tensor, "rows vocabulary"]:
    """Return the logits (fp32) at the end of each row of tokens."""
    device = next(model.parameters()).device
    ids, mask, positions = (tensor.to(device) for tensor in pad_left(rows))
    padded = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return model(**padded, use_cache=False, logits_to_keep=1).logits[:, -1].float()


class AlphaEditor(WeightEditor):
    """Search values, spread what is missing over the last layers of a few MLPs, update each in its null space.

    ConfigError if the settings do not fit the model, FactorError if a layer's inputs have no null space.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: AlphaEdit):
        super().__init__(model, settings)
        self._tokenizer, self._settings = tokenizer, settings
        self._block = block_of(self.modules[-1])
        bases = input_bases(model, self.modules, tokens=settings.calibration_tokens, seed=settings.seed)
        self._projectors = {
            name: null_space(basis, settings.threshold, name).to(self.weight(name).device)
            for name, basis in bases.items()
        }
        self._prefixes = [""]  # texts before a prompt: none, or what the model generates after common words
        for word in BEGINNINGS[: settings.prefixes]:
            (written,) = continuations(model, tokenizer, [word], settings.prefix_tokens)
            self._prefixes.append(" ".join(f"{word}{written}".split()) + ". ")

    def teach(self, edits: Sequence[Edit]) -> dict[str, Any]:
        """Write some edits in together; returns each edit's last loss of the search, ranks and seconds.

        DataError if an edit's prompt lacks its subject.
        """
        began, settings, tokenizer = time.perf_counter(), self._settings, self._tokenizer
        prompts = [
            [locate(tokenizer, edit.subject, prefix + edit.prompt, edit.new) for prefix in self._prefixes]
            for edit in edits
        ]
        essences = [locate(tokenizer, edit.subject, f"{edit.subject} is", "a").ids for edit in edits]
        searches = [
            search_value(self.model, self._block, located, essence, settings)
            for located, essence in zip(prompts, essences, strict=True)
        ]
        values = torch.stack([value for value, _ in searches], dim=1)
        for done, name in enumerate(self.modules):
            keys, outputs = self._states(prompts)
            missing = (values - outputs) / (len(self.modules) - done)
            former = self._state.get(f"{name}.former")
            A, B = null_space_update(keys[name], missing, self._projectors[name], former, settings.ridge)
            if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
                raise AdapterError(f"layer {name}: the update is not finite; lower value_lr")
            weight = self.weight(name)
            self._state[f"{name}.weight"] = (weight.double() + B @ A).to(weight.dtype)
            self.write(name, self._state[f"{name}.weight"])
            if f"{name}.A" in self._state:
                A, B = torch.cat([self._state[f"{name}.A"], A]), torch.cat([self._state[f"{name}.B"], B], 1)
            self._state |= {f"{name}.A": A, f"{name}.B": B}
        keys, outputs = self._states(prompts)
        for name, K in keys.items():
            moment = K.double() @ K.double().T
            self._state[f"{name}.former"] = moment + self._state.get(f"{name}.former", 0)
        errors = (values - outputs).norm(dim=0) / values.norm(dim=0)
        return {
            "search_loss": [loss for _, loss in searches],
            "value_error": errors.tolist(),
            "null_space_rank": {name: round(P.trace().item()) for name, P in self._projectors.items()},
            "seconds": time.perf_counter() - began,
        }

    def factors(self) -> dict[str, Pair]:
        """Return each module's update, of at most a rank an edit."""
        return {name: (self._state[f"{name}.A"].float(), self._state[f"{name}.B"].float()) for name in self.modules}

    def _states(
        self, prompts: Sequence[list[Located]]
    ) -> tuple[dict[str, Float[Tensor, "n edits"]], Float[Tensor, "d edits"]]:
        """Return each edit's keys, half the bare prompt's and half the mean of the prefixed ones, and current value."""
        count = len(self._prefixes)
        rows = [item.ids for located in prompts for item in located]
        inputs, outputs = subject_states(self.model, self.modules, self._block, rows)
        weights = torch.full((count,), 0.5 / max(count - 1, 1))
        weights[0] = 0.5 if count > 1 else 1.0
        keys = {
            name: torch.einsum("nep,p->ne", states.reshape(len(states), -1, count), weights.to(states))
            for name, states in inputs.items()
        }
        return keys, outputs[:, ::count]
