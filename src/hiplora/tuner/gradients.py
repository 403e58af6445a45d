"""Which outputs of its layers a model's predictions depend on: gradients of the log-likelihood of its own words."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hiplora.errors import ConfigError
from hiplora.spectral import SecondMoment
from hiplora.tuner.moments import bare, token_mask

_INPUT_SIDE = "set basis_sides='input', which needs no gradients"


class GradientCollector:
    """Sums up the second moments of the gradients at the outputs of some layers, while the model runs.

    The gradient is of `−log p(y)` with y drawn from the model's own next-token distribution at every position, so
    that the moment is the layer's factor of the Fisher information. A draw depends on the number of its row only. The
    first `limit` tokens are used, to the end of their row; padding does not count.
    """

    def __init__(self, model: nn.Module, modules: Sequence[str], limit: int):
        self.moments: dict[str, SecondMoment] = {}
        self._model, self._modules, self._limit = model, modules, limit
        self._rows = self._tokens = 0
        self._mask: Tensor | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Listen inside the block, to the bare base model; it is differentiated whether or not gradients are on."""
        model: Any = self._model
        with bare(model), torch.no_grad():
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            handles = [
                model.register_forward_pre_hook(self._begin, with_kwargs=True),
                model.register_forward_hook(self._end, with_kwargs=True),
                model.get_input_embeddings().register_forward_hook(self._start_graph),
            ]
            for name in self._modules:
                handles.append(model.get_submodule(name).register_forward_hook(self._hook(name)))
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    @property
    def done(self) -> bool:
        """Whether as many tokens as were asked for have been used."""
        return self._tokens >= self._limit

    def _begin(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if torch.is_inference_mode_enabled():
            raise ConfigError(
                "run_model runs under torch.inference_mode(), which allows no gradients; use torch.no_grad(), or "
                f"{_INPUT_SIDE}"
            )
        self._mask = token_mask(args, kwargs)
        torch.set_grad_enabled(not self.done)

    def _start_graph(self, _: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output.requires_grad_(True) if torch.is_grad_enabled() else output

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda gradient: self._add(name, gradient))

        return hook

    def _add(self, name: str, gradient: Tensor) -> None:
        if name not in self.moments:
            self.moments[name] = SecondMoment(gradient.shape[-1], gradient.device)
        flat = gradient.reshape(-1, gradient.shape[-1])
        assert self._mask is not None
        self.moments[name].add(flat[self._mask.to(flat.device).flatten()])

    def _end(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if self.done:
            return
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.dim() != 3 or not logits.requires_grad:
            raise ConfigError(
                f"{type(model).__name__} gives no logits that depend on its input embeddings, and the output side of "
                f"the activation basis comes from their gradients; {_INPUT_SIDE}"
            )
        if self._mask is None or self._mask.shape != logits.shape[:2]:
            self._mask = torch.ones(logits.shape[:2], dtype=torch.bool)
        mask = self._mask.cpu()
        gradient = torch.zeros_like(logits)
        for index in range(len(mask)):
            if self.done:  # the rest of this batch is left out, so that the batch size changes nothing
                mask[index] = False
            elif (count := int(mask[index].sum())) > 0:
                places = mask[index].to(logits.device)
                gradient[index, places] = _score(logits[index, places].detach(), self._rows, count).to(
                    logits.dtype
                )
                self._tokens += count
            self._rows += 1
        self._mask = mask
        torch.autograd.backward(logits, gradient)
        torch.set_grad_enabled(False)


def _score(logits: Tensor, row: int, count: int) -> Tensor:
    """Return `p − e_y`, the gradient of −log p(y) in the logits (tokens, vocabulary), for y drawn from p."""
    probabilities = logits.float().softmax(-1)
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0x9E3779B1 * (row + 1) % 2**32))
    drawn = torch.searchsorted(probabilities.double().cumsum(-1), uniform.double()[:, None].to(logits.device))
    drawn.clamp_(max=logits.shape[-1] - 1)
    return probabilities.scatter_add_(1, drawn, torch.full_like(drawn, -1, dtype=probabilities.dtype))
