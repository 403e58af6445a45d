"""Split-LoRA (Lin et al. 2024, arXiv 2407.00952): split federated training of a LoRA, simulated in one process.

Below a cut every client has its own copy of the adapter and its own shard of the training sequences; from the cut up
there is one adapter for all, the server's. Micro-batch j of a step comes from the shard of client j mod C and passes
through this client's copy. With one client it is plain LoRA, to the bit.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from hiplora.errors import ConfigError
from hiplora.training.method import LowRank, Session

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn
    from torch.utils.data import Sampler

    from hiplora.training.recipe import TrainSettings

CLIENTS_FILE = "clients.pt"
SPLIT_FIELDS = ("clients", "cut_layer", "average_every")
LAYER = re.compile(r"\.(\d+)(?:\.|$)")


class SplitLoraMethod(LowRank):
    """Split-LoRA: clients train the layers below a cut on shards of the data, a server the others on all of it."""

    title = "Split-LoRA"
    summary = (
        "A plain low-rank update. Below a cut it is the average of what several clients trained on shards of the data."
    )
    steering = ("lora_dropout", *SPLIT_FIELDS)
    not_of_peft = ("name", *SPLIT_FIELDS)

    name: Literal["split_lora"] = "split_lora"
    """The method."""
    clients: int = Field(default=4, ge=1)
    """Number of clients. Sequence i of the training data belongs to client i mod `clients`; a step takes a batch of
    each in turn, so `train.gradient_accumulation` must be a multiple of it."""
    cut_layer: int = Field(default=3, ge=0)
    """Layers below this one are on the clients' side, the others on the server's; 0 leaves the clients nothing."""
    average_every: int = Field(default=25, ge=1)
    """Optimizer steps between two averagings of the clients' sides; the last step has one too."""

    def check_training(self, train: "TrainSettings") -> None:
        """Check that every client has the same number of micro-batches in a step."""
        if train.gradient_accumulation % self.clients:
            what = f"`train.gradient_accumulation` {train.gradient_accumulation} is no multiple of"
            raise ValueError(f"{what} `method.clients` {self.clients}, who take turns in a step; change one of them")

    def batches(self, sequences: int, batch_size: int) -> int:
        """Return the number of batches in an epoch, none of which mixes the shards of two clients."""
        return sum(math.ceil(size / batch_size) for size in shard_sizes(sequences, self.clients))

    def session(self, model: "PeftModel", sequences: int) -> Session:
        """Train every client's side on its shard."""
        return SplitSession(model, self, shard_sizes(sequences, self.clients))


def shard_sizes(sequences: int, clients: int) -> list[int]:
    """Return how many sequences each client has; ConfigError if some client would have none."""
    if clients > sequences:
        what = f"method.clients {clients}: there are only {sequences} training sequences, and each client needs one"
        raise ConfigError(f"{what}; lower it, give more rows, or set train.packing: false")
    return [len(range(client, sequences, clients)) for client in range(clients)]


class ClientBatches:
    """The batches of an epoch in the order that `sampler` draws, batch j one of client j mod C.

    The larger shards belong to the first clients, so the client that runs out of sequences first is last in turn.
    """

    drop_last = False

    def __init__(self, sampler: "Sampler[int]", method: SplitLoraMethod, batch_size: int):
        self.sampler, self.method, self.batch_size = sampler, method, batch_size

    def __iter__(self) -> Iterator[list[int]]:
        clients, order = self.method.clients, list(self.sampler)
        shards = [[index for index in order if index % clients == client] for client in range(clients)]
        for start in range(0, len(shards[0]), self.batch_size):
            yield from filter(None, (shard[start : start + self.batch_size] for shard in shards))

    def __len__(self) -> int:
        return self.method.batches(len(self.sampler), self.batch_size)  # type: ignore[arg-type]


class SplitSession(Session):
    """Every client's own copy of the parameters trained below the cut: embeddings too, but no output head.

    Between micro-batches the model holds the side of client 0. The other copies are registered on the model, so that
    the optimizer steps them and their gradients are clipped together with the others'.
    """

    def __init__(self, model: "PeftModel", method: SplitLoraMethod, shards: Sequence[int]):
        from torch import nn

        super().__init__(model)
        self.clients, self._method = method.clients, method
        config: Any = model.config
        if method.cut_layer > (layers := config.get_text_config().num_hidden_layers):
            what = f"method.cut_layer {method.cut_layer}: the model has only {layers} layers"
            raise ConfigError(f"{what}; expected 0 to {layers}, the number of layers on the clients' side")
        self._slots = list(_below(model, method.cut_layer))
        if method.cut_layer and not self._slots:
            what = f"method.cut_layer {method.cut_layer}: no adapted module lies below it"
            raise ConfigError(f"{what}; raise it, set it to 0, or adapt modules below it")
        first = [getattr(module, name) for module, name in self._slots]
        self._sides = [first, *([nn.Parameter(p.detach().clone()) for p in first] for _ in shards[1:])]
        self._shares = [size / sum(shards) for size in shards]
        model.clients = nn.ParameterList([p for side in self._sides[1:] for p in side])  # type: ignore

    def batches(self, sampler: "Sampler[int]", batch_size: int) -> Any:
        """Return batches of one client each."""
        return ClientBatches(sampler, self._method, batch_size)

    def micro_batch(self, number: int) -> contextlib.AbstractContextManager[None]:
        """Put the side of the client whose turn it is into the model."""
        return self._using(self._sides[number % self.clients])

    def measuring(self) -> contextlib.AbstractContextManager[None]:
        """Put the average of the clients' sides into the model."""
        from torch import nn

        return self._using([nn.Parameter(mean, requires_grad=False) for mean in self._means()])

    def after_step(self, step: int, last: bool) -> None:
        """Give every client the average of all sides, weighted by the sizes of their shards (FedAvg), when due."""
        if step % self._method.average_every == 0 or last:
            self._set([self._means()] * self.clients)

    def save(self, folder: Path) -> None:
        """Save the average, and every client's side."""
        import torch

        with self.measuring():
            super().save(folder)
        torch.save([[parameter.detach() for parameter in side] for side in self._sides], folder / CLIENTS_FILE)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        import torch

        super().load(folder)
        self._set(torch.load(folder / CLIENTS_FILE, map_location=self.model.device, weights_only=True))

    @contextlib.contextmanager
    def _using(self, side: "Sequence[nn.Parameter]") -> Iterator[None]:
        self._put(side)
        try:
            yield
        finally:
            self._put(self._sides[0])

    def _put(self, side: "Sequence[nn.Parameter]") -> None:
        for (module, name), parameter in zip(self._slots, side, strict=True):
            setattr(module, name, parameter)

    def _means(self) -> "list[Tensor]":
        """Return the weighted averages, as steps from client 0: the average of equal sides is exact."""
        means = []
        for first, *others in zip(*([p.detach() for p in side] for side in self._sides), strict=True):
            steps = (share * (other - first) for share, other in zip(self._shares[1:], others, strict=True))
            means.append(sum(steps, start=first.clone()))
        return means

    def _set(self, sides: "Sequence[Sequence[Tensor]]") -> None:
        for side, values in zip(self._sides, sides, strict=True):
            for parameter, value in zip(side, values, strict=True):
                parameter.data.copy_(value)


def _below(model: Any, cut_layer: int) -> "Iterator[tuple[nn.Module, str]]":
    """Yield the clients' parameters as (module, name in it); a path's first number is its layer."""
    embeddings = set(model.get_input_embeddings().modules()) if cut_layer else set()
    for path, module in model.named_modules():
        layer = LAYER.search(path)
        if module in embeddings or (layer and int(layer.group(1)) < cut_layer):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    yield module, name
