"""Split-LoRA (Lin et al. 2024, arXiv 2407.00952): split federated training of a LoRA, simulated in one process.

The layers below a cut are the clients' side. Every client has its own copy of the adapter there and its own shard of
the training sequences; the layers from the cut up are the server's, with one adapter for all. A step is that of plain
LoRA, except that micro-batch j comes from the shard of client j mod C and passes through this client's copy. So the
server's gradient is the mean over the learned tokens of all clients, and a copy gets its gradient from its own shard
alone. With one client it is plain LoRA, to the bit.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hiplora.errors import ConfigError
from hiplora.recipes.methods import SplitLoraMethod, check_cut
from hiplora.training.trainer import RecordingTrainer

CLIENTS_FILE = "clients.safetensors"
_LAYER = re.compile(r"\.(\d+)(?:\.|$)")


def shard_sizes(sequences: int, clients: int) -> list[int]:
    """Return how many sequences each client has: sequence i belongs to client i mod `clients`.

    Raises:
        ConfigError: some client would have none.
    """
    if clients > sequences:
        raise ConfigError(
            f"method.clients {clients}: there are only {sequences} training sequences, and every client needs one of "
            "its own; lower it, give more rows, or, where several rows are packed into one, set train.packing: false"
        )
    return [len(range(client, sequences, clients)) for client in range(clients)]


def batches_in_epoch(sequences: int, batch_size: int, clients: int) -> int:
    """Return how many batches an epoch has when no batch mixes the shards of two clients; raises as `shard_sizes`."""
    return sum(math.ceil(size / batch_size) for size in shard_sizes(sequences, clients))


class ClientBatches(BatchSampler):
    """Batches of one client each, the clients in turn: batch j of an epoch is one of client j mod C.

    Every sequence comes once an epoch, in the order in which `sampler` draws them, shard by shard. The larger shards
    belong to the first clients, so whoever has run out of sequences at the end of an epoch is last in the turn.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, clients: int) -> None:
        """Deal what `sampler`, which must have a length, draws."""
        super().__init__(sampler, batch_size, drop_last=False)
        self._clients = clients
        self._size = len(sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[int]]:
        drawn = list(self.sampler)
        shards = [[i for i in drawn if i % self._clients == client] for client in range(self._clients)]
        for start in range(0, len(shards[0]), self.batch_size):
            for shard in shards:
                if batch := shard[start : start + self.batch_size]:
                    yield batch

    def __len__(self) -> int:
        return batches_in_epoch(self._size, self.batch_size, self._clients)


class ClientSides:
    """Every client's own copy of the trained parameters below the cut. At rest the model holds those of client 0."""

    def __init__(self, model: Any, cut_layer: int, shards: Sequence[int]) -> None:
        """Copy what `model` trains below layer `cut_layer` for as many clients as `shards` has sizes.

        Trained embeddings are the clients' too, a trained output head is the server's.

        Raises:
            ConfigError: the model has fewer layers, or nothing below the cut is trained.
        """
        check_cut(cut_layer, model.config.get_text_config().num_hidden_layers)
        self._places = list(_below(model, cut_layer))
        if cut_layer and not self._places:
            raise ConfigError(
                f"method.cut_layer {cut_layer}: no adapted module lies below it; raise it, set it to 0, or let "
                "target_modules and layers_to_transform choose modules below it"
            )
        first = [getattr(module, name) for module, name, _ in self._places]
        copies = [[nn.Parameter(p.detach().clone()) for p in first] for _ in shards[1:]]
        self._sides = [first, *copies]
        self._shares = [size / sum(shards) for size in shards]

    @property
    def copies(self) -> list[nn.Parameter]:
        """The parameters of all clients but client 0, whose parameters are the model's own."""
        return [parameter for side in self._sides[1:] for parameter in side]

    @contextlib.contextmanager
    def client(self, number: int) -> Iterator[None]:
        """Put a client's side into the model."""
        self._seat(self._sides[number])
        try:
            yield
        finally:
            self._seat(self._sides[0])

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the average of the clients' sides into the model; they themselves stay as they are."""
        self._seat([nn.Parameter(mean, requires_grad=False) for mean in self._means()])
        try:
            yield
        finally:
            self._seat(self._sides[0])

    @torch.no_grad()
    def average_(self) -> None:
        """Give every client the average of all sides, weighted by the sizes of their shards (FedAvg)."""
        for place, mean in enumerate(self._means()):
            for side in self._sides:
                side[place].copy_(mean)

    @torch.no_grad()
    def spread_(self) -> None:
        """Give every client what the model holds now: all begin with the same adapter."""
        for side in self._sides[1:]:
            for parameter, start in zip(side, self._sides[0], strict=True):
                parameter.copy_(start)

    def join(self, optimizer: torch.optim.Optimizer) -> None:
        """Have an optimizer of the model's parameters step the copies too, with the settings of their originals."""
        numbers = {id(parameter): place for place, parameter in enumerate(self._sides[0])}
        for group in list(optimizer.param_groups):
            places = [numbers[id(parameter)] for parameter in group["params"] if id(parameter) in numbers]
            if copies := [side[place] for side in self._sides[1:] for place in places]:
                optimizer.add_param_group({**group, "params": copies})

    def save(self, path: Path) -> None:
        """Write every client's side."""
        save_file({name: parameter.detach().cpu().contiguous() for name, parameter in self._named()}, path)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Take every client's side from a file that `save` wrote."""
        stored = load_file(path)
        for name, parameter in self._named():
            parameter.copy_(stored[name])

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for client, side in enumerate(self._sides):
            for (_, _, name), parameter in zip(self._places, side, strict=True):
                yield f"{client}.{name}", parameter

    def _seat(self, side: Sequence[nn.Parameter]) -> None:
        for (module, name, _), parameter in zip(self._places, side, strict=True):
            setattr(module, name, parameter)

    @torch.no_grad()
    def _means(self) -> list[Tensor]:
        """The weighted averages, as steps away from client 0: so the average of equal sides is the same to the bit."""
        means = []
        for first, *others in zip(*self._sides, strict=True):
            away = (share * (other - first) for share, other in zip(self._shares[1:], others, strict=True))
            means.append(sum(away, start=first.detach().clone()))
        return means


def _below(model: Any, cut_layer: int) -> Iterator[tuple[nn.Module, str, str]]:
    """Where the clients' parameters are: module, name in it, full name. The numbered layer in a path is the first."""
    embeddings = set(model.get_input_embeddings().modules()) if cut_layer else set()
    for path, module in model.named_modules():
        found = _LAYER.search(path)
        if module in embeddings or (found and int(found.group(1)) < cut_layer):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    yield module, name, f"{path}.{name}"


class SplitTrainer(RecordingTrainer):
    """A RecordingTrainer of Split-LoRA.

    Held-out losses and checkpoints' adapters are those of the averaged client sides; a checkpoint also has every
    client's own side, and its optimizer's state the copies' moments. The gradient is clipped as one: server and
    clients together. After training the model holds the average, one plain LoRA.
    """

    def __init__(self, *args: Any, split: SplitLoraMethod, **kwargs: Any) -> None:
        """Take RecordingTrainer's arguments and the method.

        Raises:
            ConfigError: the method's settings do not fit the model or the data.
        """
        super().__init__(*args, **kwargs)
        self._clients = self.turns = split.clients
        shards = shard_sizes(len(self.train_dataset), split.clients)  # type: ignore[arg-type]
        self.sides = ClientSides(self.adapted, split.cut_layer, shards)
        self.add_callback(_Averaging(self.sides, split.average_every))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, every client from the adapter that the model holds now, or from a checkpoint."""
        self.sides.spread_()
        return super().train(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of the clients' batches; the order is drawn as for any other method."""
        data = self._remove_unused_columns(self.train_dataset, description="Training")
        batches = ClientBatches(RandomSampler(data), self.args.train_batch_size, self._clients)
        loader = DataLoader(
            data,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Begin an optimizer step: it is client 0's turn, and the copies' gradients of the last step are gone."""
        for parameter in self.sides.copies:
            parameter.grad = None  # the Trainer clears those of the model's own parameters
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Pass a batch through the side of the client that it belongs to."""
        with self.sides.client(self._passes % self._clients):
            return super().training_step(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the optimizer, with moments of its own for every client's side."""
        made_before = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        if not made_before:
            self.sides.join(optimizer)
        return optimizer

    def held_out_loss(self) -> float:
        """Return the mean loss per learned token over the held-out rows, with the averaged client side."""
        with self.sides.averaged():
            return super().held_out_loss()

    def _clip_grad_norm(self, model: Any) -> Any:
        parameters = [*model.parameters(), *self.sides.copies]
        return self.accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = output_dir or self._get_output_dir(None)
        with self.sides.averaged():
            super()._save(folder, state_dict)
        self.sides.save(Path(folder) / CLIENTS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.sides.load(Path(resume_from_checkpoint) / CLIENTS_FILE)


class _Averaging(TrainerCallback):
    """Average the clients' sides every so many steps, and after the last one."""

    def __init__(self, sides: ClientSides, every: int) -> None:
        self._sides = sides
        self._every = every

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self._sides.average_()
