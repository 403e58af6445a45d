"""Split-LoRA: who owns which sequence and which parameter, and that a step is what its definition says."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import RandomSampler

from hiplora.errors import ConfigError
from hiplora.training.adapt import put_on
from hiplora.training.baselines.split_lora import ClientBatches, SplitLoraMethod, SplitSession
from hiplora.training.recipe import TrainRecipe
from hiplora.training.train import _arguments
from hiplora.training.trainer import AdapterTrainer, Record
from tests.tiny import tiny_llama, tiny_tokenizer

LR, DECAY, CLIP = 1e-2, 0.1, 0.5


def adapted(**settings):
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **settings)
    return get_peft_model(tiny_llama(), config)


def split(model, cut_layer, shards):
    return SplitSession(model, SplitLoraMethod(clients=len(shards), cut_layer=cut_layer, average_every=2), shards)


def trained(model, layer=0):
    """The trainable parameters of a layer."""
    mark = f"layers.{layer}."
    return {name: p for name, p in model.named_parameters() if p.requires_grad and mark in name}


@pytest.mark.parametrize(("count", "batch_size", "clients"), [(12, 2, 3), (13, 2, 3), (7, 3, 2), (5, 4, 5)])
def test_an_epoch_has_every_sequence_once_in_batches_of_one_client_the_clients_in_turn(count, batch_size, clients):
    method = SplitLoraMethod(clients=clients)
    batches = list(ClientBatches(RandomSampler(range(count)), method, batch_size))
    assert sorted(i for batch in batches for i in batch) == list(range(count))
    assert all({i % clients for i in batch} == {turn % clients} for turn, batch in enumerate(batches))
    assert len(batches) == method.batches(count, batch_size)
    assert max(map(len, batches)) <= batch_size


def test_an_average_is_weighted_by_the_shards_and_every_client_gets_it():
    model = adapted()
    session = split(model, 1, [3, 1])
    start = {name: p.detach().clone() for name, p in trained(model).items()}
    with torch.no_grad():
        for p in model.clients:
            p.add_(1.0)
    with session.measuring():
        shown = {name: p.detach().clone() for name, p in model.named_parameters() if name in start}
    assert all(torch.equal(p, start[name]) for name, p in trained(model).items())
    session.after_step(2, last=False)
    for client in (0, 1):
        with session.micro_batch(client):
            for name, p in trained(model).items():
                torch.testing.assert_close(p.detach(), start[name] + 0.25)
                assert torch.equal(p, shown[name])


def test_a_cut_that_leaves_nothing_to_train_is_an_error():
    with pytest.raises(ConfigError, match="cut_layer 3: the model has only 2 layers; expected 0 to 2"):
        split(adapted(), 3, [1])
    with pytest.raises(ConfigError, match="cut_layer 1: no adapted module lies below it"):
        split(adapted(layers_to_transform=[1]), 1, [1])


@pytest.fixture
def trainer(tmp_path):
    """A training on nine sequences, and the sequences of every step's batches."""
    method = {"name": "split_lora", "clients": 2, "cut_layer": 1, "lora_dropout": 0.0, "average_every": 2}
    train = {"steps": 3, "batch_size": 2, "gradient_accumulation": 2, "warmup_ratio": 0.0, "packing": False}
    train |= {"lr": LR, "weight_decay": DECAY, "max_grad_norm": CLIP, "dtype": "fp32"}
    recipe = TrainRecipe.model_validate({"model": "tiny", "data": "none.jsonl", "method": method, "train": train})
    generator, rows = torch.Generator().manual_seed(5), []
    for _ in range(9):
        ids = torch.randint(0, 250, (12,), generator=generator).tolist()
        learned = int(torch.randint(2, 10, (), generator=generator))
        rows.append({"input_ids": ids, "labels": [-100] * learned + ids[learned:]})
    texts, steps = {tuple(row["input_ids"]): row for row in rows}, []

    class Noting(AdapterTrainer):
        def get_batch_samples(self, *args):
            samples, items = super().get_batch_samples(*args)
            tokens = [batch["input_ids"].flatten().tolist() for batch in samples]
            steps.append([[texts[tuple(t[i : i + 12])] for i in range(0, len(t), 12)] for t in tokens])
            return samples, items

    model = put_on(recipe.method, tiny_llama(), tiny_tokenizer(), seed=recipe.seed)
    noting = Noting(
        model=model,
        args=_arguments(recipe, tmp_path, 3, flat=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        session=recipe.method.session(model, 9),
        record=Record(tmp_path, recipe.train, "test"),
    )
    return noting, steps


def whole_models(model):
    """Two models of the same weights, with an optimizer each; the adapters above the cut are shared, with a third."""
    clients = [get_peft_model(tiny_llama(), model.peft_config["default"]).train() for _ in range(2)]
    for client in clients:  # a deep copy would keep the trainer's forward of the first
        client.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("clients")})
    server = trained(clients[0], 1)
    for name, parameter in server.items():
        path, _, leaf = name.rpartition(".")
        setattr(clients[1].get_submodule(path), leaf, parameter)
    parts = [list(server.values()), *(list(trained(client).values()) for client in clients)]
    return clients, parts, [torch.optim.AdamW(part, lr=LR, weight_decay=DECAY) for part in parts]


def summed_loss(model, sequences):
    total, count = 0.0, 0
    for row in sequences:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        known = labels != -100
        logits = model(ids).logits[0, :-1][known]
        total = total + torch.nn.functional.cross_entropy(logits, labels[known], reduction="sum")
        count += int(known.sum())
    return total, count


def test_training_is_what_the_definition_says(trainer):
    """Three steps, averaged after the second and the last, against whole models with an AdamW each; the shards are
    of 5 and 4 sequences, so the weights of the average differ, and the epoch ends within the run."""
    trainer, steps = trainer
    clients, parts, optimizers = whole_models(trainer.model)
    start = {name: p.detach().clone() for name, p in clients[0].named_parameters() if p.requires_grad}
    trainer.train()
    assert [len(step) for step in steps] == [2, 2, 1]
    for number, batches in enumerate(steps, start=1):
        present = 1 + len(batches)  # the server, and the clients with a batch
        losses, counts = zip(*map(summed_loss, clients, batches), strict=True)
        for optimizer in optimizers[:present]:
            optimizer.zero_grad()
        (sum(losses) / sum(counts)).backward()
        torch.nn.utils.clip_grad_norm_([p for part in parts[:present] for p in part], CLIP)
        for optimizer in optimizers[:present]:
            optimizer.step()
        for one, other in zip(parts[1], parts[2], strict=True) if number >= 2 else ():
            one.data = (5 * one.data + 4 * other.data) / 9
            other.data = one.data.clone()
    actual = dict(trainer.model.named_parameters())
    for name, expected in clients[0].named_parameters():
        if expected.requires_grad:
            moved = (expected - start[name]).norm()
            assert moved > 0
            assert (actual[name] - expected).norm() < 1e-3 * moved  # Adam magnifies rounding where gradients vanish
