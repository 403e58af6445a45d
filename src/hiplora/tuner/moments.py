"""Collect second moments of layers' inputs and of the gradients at their outputs, while the base model runs."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora.model import _get_encoder
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from hiplora.errors import ConfigError, FactorError
from hiplora.spectral import MomentBasis, SecondMoment
from hiplora.tuner.experts import shared_side
from hiplora.tuner.targets import keep_unpacked, linear_target, short_names

Bases = dict[str, MomentBasis]
_INPUT_SIDE = "set basis_sides='input', which needs no gradients"


@contextlib.contextmanager
def base_only(model: nn.Module) -> Iterator[None]:
    """Disable adapters and switch to eval mode inside the block; restore both, and `requires_grad`, on exit."""
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    adapted = [m for m in model.modules() if isinstance(m, kinds) and not m.disable_adapters]
    keep_unpacked(model)
    with restored(model):
        model.eval()
        for layer in adapted:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in adapted:
                layer.enable_adapters(True)


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Restore every module's training mode and every parameter's `requires_grad` on exit."""
    training = {module: module.training for module in model.modules()}
    gradients = {p: p.requires_grad for p in model.parameters()}
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter, flag in gradients.items():
            parameter.requires_grad_(flag)


class _Collector:
    """Sums up second moments of layers, or of experts that share a space, while the model runs, without padding."""

    side: str

    def __init__(self, model: Any, modules: Sequence[str]):
        self.moments: dict[str, SecondMoment] = {}
        self.leader: dict[str, str] = {}  # layer → the layer whose moment it shares
        self._model, self._modules = model, modules
        self._mask: Tensor | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Collect inside the block, from the base model without its adapters, whether or not gradients are on."""
        with base_only(self._model), torch.no_grad(), contextlib.ExitStack() as handles:
            for handle in self._hooks():
                handles.callback(handle.remove)
            yield

    def _hooks(self) -> Iterator[Any]:
        raise NotImplementedError

    def _decodes_as_many(self, kwargs: dict[str, Any]) -> bool:
        """Whether a decoder reads rows of its own in a call, as long as the encoder's, which the mask is of."""
        own = next((kwargs[name] for name in ("decoder_input_ids", "labels") if kwargs.get(name) is not None), None)
        is_pair = getattr(getattr(self._model, "config", None), "is_encoder_decoder", False)
        return is_pair and own is not None and self._mask is not None and own.shape == self._mask.shape

    def add(self, name: str, vectors: Tensor, mask: Tensor | None) -> None:
        """Add the vectors (…, n) of one call to a moment, without padding where the mask fits them."""
        flat = vectors.reshape(-1, vectors.shape[-1])
        if mask is not None and mask.shape == vectors.shape[:-1]:
            flat = flat[mask.to(flat.device).flatten()]
        if name not in self.moments:
            self.moments[name] = SecondMoment(vectors.shape[-1], vectors.device)
        self.moments[name].add(flat)

    def bases(
        self, ranks: Mapping[str, int | None], directions: Callable[[SecondMoment, Any, str], MomentBasis]
    ) -> Bases:
        """Return k `directions` of each layer's moment; layers that share a moment and k share one object."""
        spaces = {name: self.leader.get(name) or shared_space(name, self.side) or name for name in ranks}
        if missed := [name for name, space in spaces.items() if not self._is_reached(space)]:
            what = "token" if self.side == "input" else "gradient"
            remedy = "use text that runs through it"
            if len(missed) < len(spaces):
                remedy += f", or leave out all such layers with exclude_modules={short_names(self._model, missed)}"
            raise FactorError(f"layer {missed[0]}: no {what} reached it while calibrating; {remedy}")
        by_space: dict[tuple[str, int | None], MomentBasis] = {}
        bases: Bases = {}
        for name, k in ranks.items():
            key = spaces[name], k
            if key not in by_space:
                by_space[key] = directions(self._moment(key[0]), k, name)
            bases[name] = by_space[key]
        return bases

    def _is_reached(self, space: str) -> bool:
        """Whether tokens came to a layer, or to other experts of its list."""
        if space in self.moments:
            return self.moments[space].tokens > 0
        expert = shared_side(space)
        return expert is not None and any(other.startswith(f"{expert[0]}.") for other in self.moments)

    def _moment(self, space: str) -> SecondMoment:
        """Return the moment of a layer that was reached: zero for an expert that got no token while others got some."""
        if space in self.moments:
            return self.moments[space]
        m, n = linear_target(self._model.get_submodule(space), space).shape
        moment = SecondMoment(n if self.side == "input" else m)
        moment.tokens = 1
        return moment


class MomentCollector(_Collector):
    """Collects moments of inputs; layers called in a row with the very same tensor (q, k, v; gate, up) share one."""

    side = "input"
    _last: tuple[str, Tensor] | None = None
    _masked: set[nn.Module] | None = None  # the modules that the mask applies to; None: wherever it fits

    def _hooks(self) -> Iterator[Any]:
        yield self._model.register_forward_pre_hook(self._begin, with_kwargs=True)
        for name in self._modules:
            yield self._model.get_submodule(name).register_forward_pre_hook(self._hook(name), with_kwargs=True)

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._mask, self._last = token_mask(args, kwargs), None
        self._masked = {*(_get_encoder(model) or model).modules()} if self._decodes_as_many(kwargs) else None

    def _hook(self, name: str) -> Any:
        shared = shared_space(name, "input")

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            x, last = next(iter((*args, *kwargs.values()))), self._last
            if shared is not None:
                self.add(shared, x, None)
            elif last is not None and x is last[1] and self.leader.get(name, last[0]) == last[0]:
                self.leader[name] = last[0]
            elif self.leader.setdefault(name, name) == name:  # else its leader has added this tensor in this pass
                self._last = (name, x)
                self.add(name, x, self._mask if self._masked is None or module in self._masked else None)

        return hook


class GradientCollector(_Collector):
    """Collects moments of the gradients of `−log p(y)` at layers' outputs, y drawn from the model's own distribution.

    So the moment is the layer's factor of the Fisher information. A draw depends on the number of its row only. The
    first `limit` tokens are used, to the end of their row.
    """

    side = "output"

    def __init__(self, model: nn.Module, modules: Sequence[str], limit: int):
        super().__init__(model, modules)
        self._limit, self._rows, self._tokens = limit, 0, 0

    def _hooks(self) -> Iterator[Any]:
        self._model.requires_grad_(False)  # `base_only` restores it
        yield self._model.register_forward_pre_hook(self._begin, with_kwargs=True)
        yield self._model.register_forward_hook(self._end, with_kwargs=True)
        for name in self._modules:
            yield self._model.get_submodule(name).register_forward_hook(self._hook(name))

    @property
    def _done(self) -> bool:
        return self._tokens >= self._limit

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if torch.is_inference_mode_enabled():
            raise ConfigError(
                "run_model runs under torch.inference_mode(), which allows no gradients; use torch.no_grad(), or "
                f"{_INPUT_SIDE}"
            )
        self._mask = token_mask(args, kwargs)
        if self._decodes_as_many(kwargs):
            self._mask = None  # the logits are the decoder's; no gradient reaches the encoder's padding
        torch.set_grad_enabled(not self._done)
        if "use_cache" in inspect.signature(model.forward).parameters:  # RWKV would write its state in place
            kwargs = {**kwargs, "use_cache": False}
        return args, kwargs

    def _hook(self, name: str) -> Callable[..., Tensor]:
        space = shared_space(name, "output") or name

        def hook(_: nn.Module, args: tuple, output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return output
            if (
                not output.requires_grad
            ):  # the first layer: the graph begins here, with a copy that may change in place
                output = output.detach().requires_grad_(True).clone()
            output.register_hook(lambda gradient: self.add(space, gradient, self._mask))
            return output

        return hook

    def _end(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if self._done:
            return
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.dim() not in (2, 3) or not logits.requires_grad:
            raise ConfigError(
                f"{type(model).__name__} gives no logits, one row a token or one a text, that depend on the layers "
                f"to calibrate, and the output side of the activation basis comes from their gradients; {_INPUT_SIDE}"
            )
        logits = logits if logits.dim() == 3 else logits[:, None]  # a classifier has one prediction a row
        if self._mask is None or self._mask.shape != logits.shape[:2]:
            self._mask = torch.ones(logits.shape[:2], dtype=torch.bool)
        mask = self._mask.cpu()
        gradient = torch.zeros_like(logits)
        for index in range(len(mask)):
            if self._done:  # the rest of this batch is left out, so that the batch size changes nothing
                mask[index] = False
            elif (count := int(mask[index].sum())) > 0:
                tokens = mask[index].to(logits.device)
                gradient[index, tokens] = score(logits[index, tokens].detach(), self._rows).to(logits.dtype)
                self._tokens += count
            self._rows += 1
        self._mask = None if mask.all() else mask
        try:
            torch.autograd.backward(logits, gradient)
        except RuntimeError as error:
            if "inplace operation" not in str(error):
                raise
            raise ConfigError(
                f"{type(model).__name__} changes in place what its gradients need, and the output side of the "
                f"activation basis comes from them; {_INPUT_SIDE}"
            ) from error
        torch.set_grad_enabled(False)


def shared_space(name: str, side: str) -> str | None:
    """Return the name under which a layer's side is measured together with other experts'; None if it is not."""
    shared = shared_side(name)
    return shared[0] if shared is not None and shared[1] == side else None


def measure_inputs(
    model: nn.Module, modules: Sequence[str], run: Callable[[], Any], trailing: Mapping[str, int] | None = None
) -> Bases:
    """Measure the inputs of some layers while `run` runs the model: leading directions, or the `trailing` last ones."""
    collector = MomentCollector(model, modules)
    with collector.watching():
        run()
    if trailing is not None:
        return collector.bases(trailing, SecondMoment.trailing)
    return collector.bases(dict.fromkeys(modules), lambda moment, _, name: moment.eigen(name))


def measure_outputs(model: nn.Module, ranks: Mapping[str, int], run: Callable[[], Any], limit: int) -> Bases:
    """Measure which outputs of some layers matter: k directions of each, on the first `limit` tokens."""
    collector = GradientCollector(model, list(ranks), limit)
    with collector.watching():
        run()
    return collector.bases(ranks, SecondMoment.leading)


def score(logits: Tensor, row: int) -> Tensor:
    """Return `p − e_y`, the gradient of −log p(y) in the logits (tokens, vocabulary), for y drawn from p."""
    generator = torch.Generator().manual_seed(0x9E3779B1 * (row + 1) % 2**32)
    if logits.shape[-1] == 1:  # a number, not a choice: y is from a unit-variance Gaussian around it
        return torch.randn(logits.shape, generator=generator).to(logits)
    probabilities = logits.float().softmax(-1)
    uniform = torch.rand(len(logits), generator=generator).double()[:, None].to(logits.device)
    drawn = torch.searchsorted(probabilities.double().cumsum(-1), uniform).clamp_(max=logits.shape[-1] - 1)
    return probabilities.scatter_add_(1, drawn, torch.full_like(drawn, -1, dtype=probabilities.dtype))


def token_mask(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """Return which tokens of a model's call are not padding, (rows, length); None if all, or the call does not say."""
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 and not mask.all() else None
