"""AlphaEdit (Fang et al. 2024): edits written into MLP weights, kept out of the directions that other text uses."""

import re
import time
from collections.abc import Mapping, Sequence
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
from hiplora.editing.subjects import BEGINNINGS, Located, locate, search_value, subject_states, write_prefixes
from hiplora.errors import AdapterError, ConfigError, FactorError
from hiplora.spectral import MomentBasis
from hiplora.tuner import input_bases

_WRITTEN = 1e-5  # share of an update's norm that may be lost in writing


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class AlphaEdit:
    """AlphaEdit's settings; the defaults are those of its formula and of its authors' published configurations.

    `layers` are the blocks whose `mlp.down_proj` is edited; None is five that end at a quarter of the depth (4 to 8 of
    32). `threshold` bounds the null space (see `null_space`), measured on `calibration_tokens` of text. `ridge` is the
    weight of the update's size. The `value_…` settings are for the search for each edit's value (`search_value`);
    `value_lr` is in units of the hidden state (the authors': 0.5 for GPT-J, 0.1 for Llama 3): raise it if the record's
    `search_loss` stays high. Search and keys see the prompt bare and behind `prefixes` texts of `prefix_tokens` tokens
    that the model generates.
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
        self.restore({})

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
        essences = [locate(self._tokenizer, edit.subject, f"{edit.subject} is", "a").ids for edit in edits]
        asked = zip(prompts, essences, strict=True)
        found = [search_value(self.model, self._block, group, essence, settings) for group, essence in asked]
        values = torch.stack([value for value, _ in found], dim=1)
        for done, name in enumerate(self.modules):
            keys, outputs = self._states(prompts)
            missing = (values - outputs) / (len(self.modules) - done)
            A, B = null_space_update(
                keys[name], missing, self._projectors[name], self._former.get(name), settings.ridge
            )
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
            "search_loss": [loss for _, loss in found],
            "value_error": left.tolist(),
            "null_space_rank": {name: round(P.trace().item()) for name, P in self._projectors.items()},
            "seconds": time.perf_counter() - began,
        }

    def state(self) -> dict[str, Tensor]:
        """Return the edited weights, their updates, and the moments of the keys."""
        found = {}
        for name, parts in self.updates.items():
            found[f"{name}.weight"], found[f"{name}.former"] = self._weight(name).data, self._former[name]
            for side, tensors in zip("AB", zip(*parts, strict=True), strict=True):
                found[f"{name}.{side}"] = torch.cat(tensors, dim="AB".index(side))
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Write the edits of a `state` in; without any, put the base's weights back."""
        self._former: dict[str, Float[Tensor, "n n"]] = {}  # moments of the keys
        self.updates: dict[str, list[tuple[Tensor, Tensor]]] = {}  # `(A, B)` of each batch, with Δ = BA
        for name in self.modules:
            weight = self._weight(name)
            weight.data = self._kept[f"{name}.weight"][1]
            if state:
                weight.data, former, A, B = (
                    state[f"{name}.{part}"].to(weight.device) for part in ("weight", "former", "A", "B")
                )
                self._former[name], self.updates[name] = former, [(A, B)]

    def save(self, folder: Path, base: str) -> None:
        """Write the edits so far as a plain LoRA adapter of at most a rank an edit; `base` names the model.

        Raises:
            AdapterError: what was written differs from the update.
        """
        state = self.state()
        factors = {name: (state[f"{name}.A"].float().cpu(), state[f"{name}.B"].float().cpu()) for name in self.updates}
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
