"""Split-LoRA: who owns which sequence and which parameter, and that a step is what its definition says."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import RandomSampler

from hiplora.errors import ConfigError
from hiplora.training.adapt import put_on
from hiplora.training.baselines.split_lora import ClientBatches, SplitLoraMethod, SplitSession, shard_sizes
from hiplora.training.recipe import TrainRecipe
from hiplora.training.train import _arguments
from hiplora.training.trainer import AdapterTrainer, Record
from tests.tiny import tiny_llama, tiny_tokenizer

LR, DECAY, CLIP = 1e-2, 0.1, 0.5


def epoch(count, batch_size, clients):
    method = SplitLoraMethod(clients=clients)
    return list(ClientBatches(RandomSampler(range(count)), method, batch_size))


def sides(model, cut_layer, shards):
    return SplitSession(model, SplitLoraMethod(clients=len(shards), cut_layer=cut_layer, average_every=2), shards)


@pytest.mark.parametrize(("count", "batch_size", "clients"), [(12, 2, 3), (13, 2, 3), (7, 3, 2), (5, 4, 5)])
def test_an_epoch_has_every_sequence_once_in_batches_of_one_client_the_clients_in_turn(count, batch_size, clients):
    batches = epoch(count, batch_size, clients)
    assert sorted(i for batch in batches for i in batch) == list(range(count))
    assert all({i % clients for i in batch} == {turn % clients} for turn, batch in enumerate(batches))
    assert len(batches) == SplitLoraMethod(clients=clients).batches(count, batch_size)
    assert max(map(len, batches)) <= batch_size


def test_a_client_without_a_sequence_is_an_error():
    with pytest.raises(ConfigError, match=r"method\.clients 4: there are only 3 training sequences"):
        shard_sizes(3, 4)


def adapted(**settings):
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **settings)
    return get_peft_model(tiny_llama(), config)


def below(model, marks=("layers.0.",)):
    return {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad and any(mark in name for mark in marks) and not name.startswith("clients")
    }


def test_the_clients_have_the_layers_below_the_cut_and_the_server_the_others():
    model = adapted()
    split = sides(model, 1, [1, 1])
    own, server = below(model), below(model, ["layers.1."])
    assert len(own) == len(server) == 4
    with split.micro_batch(1):
        other = below(model)
        assert all(server[name] is p for name, p in below(model, ["layers.1."]).items())
    assert all(other[name] is not own[name] and torch.equal(other[name], own[name]) for name in own)
    assert all(own[name] is p for name, p in below(model).items())


def test_an_average_is_weighted_by_the_shards_and_every_client_gets_it():
    model = adapted()
    split = sides(model, 1, [3, 1])
    start = {name: p.detach().clone() for name, p in below(model).items()}
    with torch.no_grad():
        for p in model.clients:
            p.add_(1.0)
    with split.measuring():
        shown = {name: p.detach().clone() for name, p in model.named_parameters() if name in start}
    assert all(torch.equal(p, start[name]) for name, p in below(model).items())
    split.after_step(2, last=False)
    for name, p in below(model).items():
        torch.testing.assert_close(p.detach(), start[name] + 0.25)
        assert torch.equal(p, shown[name])
    with split.micro_batch(1):
        assert all(torch.equal(p, shown[name]) for name, p in below(model).items())


def test_a_cut_that_leaves_nothing_to_train_is_an_error():
    with pytest.raises(ConfigError, match="cut_layer 3: the model has only 2 layers; expected 0 to 2"):
        sides(adapted(), 3, [1])
    with pytest.raises(ConfigError, match="cut_layer 1: no adapted module lies below it"):
        sides(adapted(layers_to_transform=[1]), 1, [1])


def trainer_for(tmp_path, count):
    method = {"name": "split_lora", "clients": 2, "cut_layer": 1, "lora_dropout": 0.0, "average_every": 2}
    train = {"steps": 3, "batch_size": 2, "gradient_accumulation": 2, "warmup_ratio": 0.0, "packing": False}
    train |= {"lr": LR, "weight_decay": DECAY, "max_grad_norm": CLIP, "dtype": "fp32"}
    recipe = TrainRecipe.model_validate({"model": "tiny", "data": "none.jsonl", "method": method, "train": train})
    generator = torch.Generator().manual_seed(5)
    rows = []
    for _ in range(count):
        ids = torch.randint(0, 250, (12,), generator=generator).tolist()
        learned = int(torch.randint(2, 10, (), generator=generator))
        rows.append({"input_ids": ids, "labels": [-100] * learned + ids[learned:]})
    model = put_on(recipe.method, tiny_llama(), tiny_tokenizer(), seed=recipe.seed)
    session = recipe.method.session(model, count)
    return AdapterTrainer(
        model=model,
        args=_arguments(recipe, tmp_path, 3, model),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        session=session,
        record=Record(tmp_path, recipe.train, "test"),
    )


def summed_loss(model, sequences):
    total, count = 0.0, 0
    for row in sequences:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        known = labels != -100
        logits = model(ids).logits[0, :-1][known]
        total = total + torch.nn.functional.cross_entropy(logits, labels[known], reduction="sum")
        count += int(known.sum())
    return total, count


def step_by_definition(clients, server, optimizers, batches):
    """Every client a whole model of its own, but for the server's parameters, which are the same in all."""
    passed = [summed_loss(model, batch) for model, batch in zip(clients, batches, strict=True)]
    tokens = sum(count for _, count in passed)
    for optimizer in optimizers:
        optimizer.zero_grad()
    for loss, _ in passed:
        (loss / tokens).backward()
    everything = [*server, *(p for model in clients for p in below(model).values())]
    torch.nn.utils.clip_grad_norm_(everything, CLIP)
    for optimizer in optimizers:
        optimizer.step()


def same_as(model):
    """Another model of the same weights; a deep copy would keep the trainer's forward of the first."""
    other = get_peft_model(tiny_llama(), model.peft_config["default"])
    other.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("clients")})
    return other.train()


def share_server(clients):
    """Make the adapters above the cut of all models the first one's; return its parameters."""
    shared = below(clients[0], ["layers.1."])
    for model in clients[1:]:
        for name, parameter in shared.items():
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, parameter)
    return list(shared.values())


def test_training_is_what_the_definition_says(tmp_path):
    """Three steps, averaged after the second and the last, against whole models with an AdamW each; the shards are
    of 5 and 4 sequences, so the weights of the average differ, and the epoch ends within the run."""
    trainer = trainer_for(tmp_path, count=9)
    clients = [same_as(trainer.model) for _ in range(2)]
    server = share_server(clients)
    optimizers = [torch.optim.AdamW(server, lr=LR, weight_decay=DECAY)]
    optimizers += [torch.optim.AdamW(below(m).values(), lr=LR, weight_decay=DECAY) for m in clients]
    steps = recorded_steps(trainer)
    trainer.train()
    assert [len(step) for step in steps] == [2, 2, 1]
    for number, batches in enumerate(steps, start=1):
        step_by_definition(clients[: len(batches)], server, optimizers, batches)
        if number >= 2:
            with torch.no_grad():
                for one, other in zip(below(clients[0]).values(), below(clients[1]).values(), strict=True):
                    mean = (5 * one + 4 * other) / 9
                    one.copy_(mean), other.copy_(mean)
    wanted = {name: p for name, p in clients[0].named_parameters() if p.requires_grad}
    start = trainer_for(tmp_path, count=9).model.state_dict()
    assert wanted
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and not name.startswith("clients"):
            moved = (wanted[name] - start[name]).norm()
            assert (parameter - start[name]).norm() > 0
            assert (parameter - wanted[name]).norm() < 1e-3 * moved  # Adam magnifies rounding where gradients vanish


def recorded_steps(trainer):
    """Have a trainer note the sequences of every step's batches."""
    rows, steps = list(trainer.train_dataset), []
    take = AdapterTrainer.get_batch_samples

    def noting(iterator, count, device):
        samples, items = take(trainer, iterator, count, device)
        steps.append([_rows_of(batch, rows) for batch in samples])
        return samples, items

    trainer.get_batch_samples = noting
    return steps


def _rows_of(batch, rows):
    tokens = batch["input_ids"].flatten().tolist()
    texts = {tuple(row["input_ids"]): row for row in rows}
    return [texts[tuple(tokens[i : i + 12])] for i in range(0, len(tokens), 12)]
