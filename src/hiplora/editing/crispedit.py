"""Edits trained into MLP weights, kept out of the pairs of directions that the model's other text depends on.

The idea is CrispEdit's (arXiv 2602.15823): to second order the KL divergence from the base is `½ tr(G ΔW C ΔWᵀ)`, with
C the second moment of a layer's inputs and G that of the gradients at its outputs, so ΔW keeps to their eigenpairs with
small products of eigenvalues. Weights are trained whole, so that the mask is exact.
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hiplora.adapters.update import Pair, balanced
from hiplora.editing.editors import EditTraining, WeightEditor, WeightEdits, as_stored, train_edits
from hiplora.editing.edits import Edit
from hiplora.spectral import MomentBasis
from hiplora.tuner import GRADIENT_TOKENS, CalibrationText
from hiplora.tuner.targets import frozen_weight

_RANK_TOLERANCE = 1e-6  # of the largest singular value; smaller ones are left out of the saved factors


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class CrispEdit(WeightEdits):
    """Settings: `energy` is the share that the protected pairs hold of a random update's KL to second order."""

    title: ClassVar[str] = "CrispEdit"
    energy: Annotated[float, Field(gt=0, lt=1)] = 0.9


def protected_pairs(inputs: MomentBasis, outputs: MomentBasis, energy: float) -> Bool[Tensor, "p q"]:
    """Return which eigenpairs (i, j) are protected: the fewest that hold a share of `Σ μ_i λ_j`, of outputs and inputs.

    p and q are the eigenvectors that are kept of the outputs and of the inputs.
    """
    mu, lambdas = (basis.values.double().clamp(min=0) for basis in (outputs, inputs))
    products = torch.outer(mu[: outputs.vectors.shape[1]], lambdas[: inputs.vectors.shape[1]])
    order = products.flatten().argsort(descending=True, stable=True)
    sizes = products.flatten()[order]
    before = sizes.cumsum(0) - sizes
    protected = torch.zeros(products.numel(), dtype=torch.bool)
    protected[order[(sizes > 0) & (before < energy * mu.sum() * lambdas.sum())]] = True
    return protected.view_as(products)


class _Masked(nn.Module):
    """A weight with a trained update beside it, less what that has in the protected pairs."""

    def __init__(self, layer: nn.Module, inputs: MomentBasis, outputs: MomentBasis, energy: float):
        super().__init__()
        self._as_stored = functools.partial(as_stored, layer)
        self.update = nn.Parameter(torch.zeros_like(frozen_weight(layer), dtype=torch.float32))
        self._E, self._F = inputs.vectors.to(self.update), outputs.vectors.to(self.update)
        self._pairs = protected_pairs(inputs, outputs, energy).to(self.update)

    def masked(self, update: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """Return the update without the protected pairs; its gradient is masked by the same."""
        return update - self._F @ (self._pairs * (self._F.T @ update @ self._E)) @ self._E.T

    def forward(self, weight: Tensor) -> Tensor:
        """Return the edited weight, as the layer stores it."""
        return weight + self._as_stored(self.masked(self.update)).to(weight.dtype)


def _unmask(layer: nn.Module, order: Sequence[str]) -> None:
    """Take the update from beside a layer's weight, and leave its parameters in their order."""
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    for name in order:
        layer.register_parameter(name, layer._parameters.pop(name))


class CrispEditor(WeightEditor):
    """Train the weights of the last layers of a few MLPs on the edits, off the protected pairs."""

    def __init__(
        self, model: Any, tokenizer: Any, settings: CrispEdit, training: EditTraining, progress: bool = False
    ):
        super().__init__(model, settings)
        self._train = functools.partial(train_edits, model, tokenizer, training=training, progress=progress)
        text = CalibrationText(model, tokens=settings.calibration_tokens, seed=settings.seed, tokenizer=tokenizer)
        inputs = text.inputs(self.modules)
        outputs = text.outputs({name: len(self.weight(name)) for name in self.modules}, GRADIENT_TOKENS)
        self._masked = {
            name: _Masked(model.get_submodule(name), inputs[name], outputs[name], settings.energy)
            for name in self.modules
        }

    def teach(self, edits: Sequence[Edit]) -> dict[str, Any]:
        """Train the weights on some edits; returns what `train_edits` does, and the shares of pairs protected."""
        with contextlib.ExitStack() as stack:
            for name, masked in self._masked.items():
                layer, previous = self.model.get_submodule(name), self._state.get(f"{name}.update")
                order = list(layer._parameters)
                self.write(name, self.of_base(name))
                masked.update.data = torch.zeros_like(masked.update) if previous is None else previous.clone()
                parametrize.register_parametrization(layer, "weight", masked)
                stack.callback(_unmask, layer, order)
            training = self._train(edits)
        for name, masked in self._masked.items():
            base, update = self.of_base(name), masked.update.detach()
            self._state[f"{name}.weight"] = base + masked.masked(update).to(base.dtype)
            self._state[f"{name}.update"] = update
            self.write(name, self._state[f"{name}.weight"])
        shares = {name: masked._pairs.mean().item() for name, masked in self._masked.items()}
        return {**training, "protected_pairs": shares}

    @torch.no_grad()
    def factors(self) -> dict[str, Pair]:
        """Return each layer's update as thin factors, of its numerical rank."""
        factors = {}
        for name, masked in self._masked.items():
            update = masked.masked(self._state[f"{name}.update"])
            U, sigma, Vt = torch.linalg.svd(update.double().cpu(), full_matrices=False)
            q = int((sigma > _RANK_TOLERANCE * sigma[0]).sum())
            factors[name] = balanced(U[:, :q], sigma[:q], Vt[:q].T)
        return factors
