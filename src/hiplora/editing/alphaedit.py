"""AlphaEdit (Fang et al. 2024): edits written into MLP weights, kept out of the directions that other text uses."""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Float
from pydantic import ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from hiplora.adapters import AdapterUpdate, compare_modules, read_update, refuse_over, write_lora
from hiplora.editing.editors import Editor, PositiveFloat
from hiplora.editing.edits import Edit
from hiplora.editing.subjects import (
    BEGINNINGS,
    Located,
    locate,
    search_values,
    subject_states,
    write_prefixes,
)
from hiplora.errors import AdapterError, ConfigError, FactorError
from hiplora.spectral import MomentBasis
from hiplora.tuner import input_bases

_WRITTEN = 1e-5  # share of an update's norm that may be lost in writing


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class AlphaEdit:
    """AlphaEdit's settings; the defaults are those of its formula and of its authors' published configurations.

    The authors' learning rate of the search, `value_lr`, is 0.5 for GPT-J and 0.1 for Llama 3: it is in units of the
    hidden state. Raise it if the record's `search_loss` stays high.

    `layers` are the blocks whose `mlp.down_proj` is edited; None is five that end at a quarter of the depth (4 to 8 of
    32). `threshold` bounds the null space (see `null_space`), measured on `calibration_tokens` of text. `ridge` is the
    weight of the update's size. The `value_…` settings are for the search for each edit's value: Adam steps, learning
    rate, decay, weight of the divergence on "… is a", and how far the value may move relative to its norm. The
    search and the keys see the prompt bare and behind `prefixes` texts of `prefix_tokens` tokens that the model
    generates. `edits_at_once` are searched together.
    """

    layers: tuple[int, ...] | None = None
    threshold: PositiveFloat = 0.02
    calibration_tokens: Annotated[int, Field(ge=2)] = 10_000
    ridge: PositiveFloat = 1.0
    value_steps: Annotated[int, Field(ge=2)] = 25
    value_lr: PositiveFloat = 0.5
    value_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    value_kl: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0625
    value_clamp: PositiveFloat = 0.75
    prefixes: Annotated[int, Field(ge=0, le=len(BEGINNINGS))] = 5
    prefix_tokens: PositiveInt = 10
    edits_at_once: PositiveInt = 8
    seed: int = 0

    def modules(self, model: nn.Module) -> list[str]:
        """Return the names of the edited weights' modules, in order.

        Raises:
            ConfigError: the model is not built like a Llama, or has no block of a chosen index.
        """
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        found = [name for name in names if re.search(r"\.\d+\.mlp\.down_proj$", name)]
        depth = len(found)
        if depth < 2:
            raise ConfigError(
                "the model has no blocks with a linear layer mlp.down_proj; AlphaEdit edits Llama-like models only"
            )
        layers = default_layers(depth) if self.layers is None else self.layers
        if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] > depth - 2:
            raise ConfigError(
                f"layers is {list(layers)}; expected rising indices from 0 to {depth - 2}: the model has "
                f"{depth} blocks, and something must come after the last that is edited"
            )
        return [found[index] for index in layers]


def default_layers(depth: int) -> tuple[int, ...]:
    """Return up to five blocks that end at a quarter of the depth: 4 to 8 of 32, as AlphaEdit's authors chose."""
    last = min(round(depth / 4), depth - 2)
    return tuple(range(max(0, last - 4), last + 1))


def null_space(basis: MomentBasis, threshold: float, name: str = "layer") -> Float[Tensor, "n n"]:
    """Return P, the projector on the directions in which `E[kkᵀ]` of the keys to preserve is below a threshold.

    Args:
        basis: eigenvalues, descending, and eigenvectors of the second moment of the keys: what goes into a weight.
        threshold: an absolute eigenvalue, as the authors' (0.02); directions below it are free to edit.
        name: of the layer, for messages.

    Raises:
        FactorError: no direction is below the threshold, or more are above it than eigenvectors were kept.

    Source: AlphaEdit, Sect. 3.1.
    """
    n, held = basis.vectors.shape
    above = int((basis.values >= threshold).sum())
    if above >= n or above > held:
        raise FactorError(
            f"layer {name}: {above} of {n} directions of its inputs are above the threshold {threshold}, at most "
            f"{min(n - 1, held)} can be; raise threshold (the mean over the directions is {basis.values.mean():.2g})"
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
    """Return `(A, B)` with `BA = Δ = R K₁ᵀ P (Kₚ Kₚᵀ P + K₁ K₁ᵀ P + ridge I)⁻¹`, in float64.

    Δ is the change that brings the values of the keys K₁ nearest to their targets (R is what is missing), stays
    small, moves the keys of former edits little, and leaves every key x with P x = 0 exactly where it was.

    Args:
        keys: K₁, inputs of the weight at the new edits, one a column.
        residual: R, target values less current ones.
        P: the projector from `null_space`.
        former: Kₚ Kₚᵀ, of the edits made before, if there were any.
        ridge: weight of ‖Δ‖²; AlphaEdit's formula has 1.

    Source: AlphaEdit, Eq. 14.
    """
    K = keys.double()
    moment = K @ K.T if former is None else K @ K.T + former.double()
    system = P @ moment + ridge * torch.eye(len(P), dtype=torch.float64, device=P.device)
    return torch.linalg.solve(system, P @ K).T, residual.double()


class AlphaEditor(Editor):
    """Search values, spread what is missing over a few `mlp.down_proj`, update each in its null space.

    Raises (on construction):
        ConfigError: the settings do not fit the model.
        FactorError: an edited layer's inputs have no null space at this threshold.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: AlphaEdit):
        self.model: nn.Module = model
        self._tokenizer, self._settings = tokenizer, settings
        self.modules = settings.modules(model)
        self._block = self.modules[-1].removesuffix(".mlp.down_proj")
        super().__init__(model)
        model.eval().requires_grad_(False)
        bases = input_bases(model, self.modules, tokens=settings.calibration_tokens, seed=settings.seed)
        self._projectors = {
            name: null_space(basis, settings.threshold, name).to(self._weight(name).device)
            for name, basis in bases.items()
        }
        self._prefixes = write_prefixes(model, tokenizer, settings.prefixes, settings.prefix_tokens)
        self.reset()

    def teach(self, edits: Sequence[Edit]) -> dict[str, Any]:
        """Write some edits in together; returns each edit's last loss of the search, ranks and seconds.

        Raises:
            DataError: an edit's subject does not stand in its prompt.
        """
        began, settings = time.perf_counter(), self._settings
        texts = ["", *self._prefixes]
        prompts = [
            [locate(self._tokenizer, edit.subject, text + edit.prompt, edit.new) for text in texts] for edit in edits
        ]
        essences = [locate(self._tokenizer, edit.subject, f"{edit.subject} is", "a") for edit in edits]
        found: list[Tensor] = []
        losses: list[float] = []
        for first in range(0, len(edits), settings.edits_at_once):
            part = slice(first, first + settings.edits_at_once)
            searched, last = search_values(self.model, self._block, prompts[part], essences[part], settings)
            found.append(searched)
            losses += last
        values = torch.cat(found, dim=1)
        for done, name in enumerate(self.modules):
            keys, outputs = self._states(prompts)
            missing = (values - outputs) / (len(self.modules) - done)
            P, former = self._projectors[name], self._former.get(name)
            A, B = null_space_update(keys[name], missing, P, former, settings.ridge)
            if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
                raise AdapterError(f"layer {name}: the update is not finite; lower value_lr")
            self.updates.setdefault(name, []).append((A, B))
            weight = self._weight(name)
            # A tensor of its own: the base's stays as it is, to be put back.
            weight.data = (weight.data.double() + B @ A).to(weight.dtype)
        keys, outputs = self._states(prompts)
        for name, K in keys.items():
            self._former[name] = self._former.get(name, 0) + K.double() @ K.double().T
        left = (values - outputs).norm(dim=0) / values.norm(dim=0)
        return {
            "search_loss": losses,
            "value_error": left.tolist(),
            "null_space_rank": {name: round(P.trace().item()) for name, P in self._projectors.items()},
            "seconds": time.perf_counter() - began,
        }

    def reset(self) -> None:
        """Put the base's weights back, and forget the keys and updates of all edits so far."""
        for name in self.modules:
            self._weight(name).data = self._kept[f"{name}.weight"][1]
        self._former: dict[str, Float[Tensor, "n n"]] = {}  # moments of the keys
        self.updates: dict[str, list[tuple[Tensor, Tensor]]] = {}  # `(A, B)` of each batch, with Δ = BA

    def save(self, folder: Path, base: str) -> None:
        """Write the edits so far as a plain LoRA adapter of at most a rank an edit; `base` names the model.

        Raises:
            AdapterError: what was written differs from the update.
        """
        factors = {
            name: (
                torch.cat([A for A, _ in parts]).float().cpu(),
                torch.cat([B for _, B in parts], 1).float().cpu(),
            )
            for name, parts in self.updates.items()
        }
        config = {"target_modules": sorted(factors), "task_type": "CAUSAL_LM"}
        update = AdapterUpdate(base, "lora", config, factors, source="AlphaEdit's updates")
        folder.mkdir(parents=True, exist_ok=True)
        write_lora(update, folder)
        refuse_over(compare_modules(update, read_update(folder)), _WRITTEN)

    def _weight(self, name: str) -> nn.Parameter:
        return self.model.get_submodule(name).get_parameter("weight")

    def _states(
        self, prompts: Sequence[list[Located]]
    ) -> tuple[dict[str, Float[Tensor, "n edits"]], Float[Tensor, "d edits"]]:
        """Each edit's keys, half the bare prompt's and half the mean of the prefixed ones, and its current value."""
        each = len(self._prefixes) + 1
        rows = [item.ids for group in prompts for item in group]
        inputs, outputs = subject_states(self.model, self.modules, self._block, rows)
        share = torch.full((each,), 0.5 / max(each - 1, 1))
        share[0] = 0.5 if each > 1 else 1.0
        keys = {
            name: torch.einsum("nep,p->ne", states.reshape(len(states), -1, each), share.to(states))
            for name, states in inputs.items()
        }
        return keys, outputs[:, ::each]
