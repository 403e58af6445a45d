"""Two processes train what one does: DDP, FSDP2, FSDP1 with both of its layouts, DeepSpeed; saved, and trained on."""

import functools
import gc
import os

import peft
import pytest
import torch
from safetensors.torch import load_file

import hiplora
from hiplora.errors import AdapterError
from tests.contract.conftest import Base
from tests.tiny import tiny_mixture

pytestmark = pytest.mark.slow
KINDS = ("ddp", "fsdp2", "fsdp1", "fsdp1 flat")
MLPS = ["gate_proj", "up_proj", "down_proj"]  # Adam magnifies rounding in the tiny model's attention
SETTINGS = {
    "paper": {"stability_weight": 3.0},
    "paper, proximal, relative": {"stability_weight": 3.0, "stability_mode": "proximal", "relative_gains": True},
    "function-aware": {"preset": "function-aware"},
    "paper, no budget": {"stability_mode": "none", "target_modules": MLPS},
}
UNPRICED = ("function-aware", "paper, no budget")  # no optimizer hook needs to see their steps
PARTS = ((None, range(2), "first"), ("first", range(2, 4), "second"))  # trained from, steps, saved as


def batch(step):
    return torch.randint(0, 256, (4, 10), generator=torch.Generator().manual_seed(step))


def started(settings, folder=None):
    torch.manual_seed(0)
    base = Base("untied")
    if folder is not None:
        return peft.PeftModel.from_pretrained(base.make(), folder, is_trainable=True).train()
    return peft.get_peft_model(base.make(), base.config(**SETTINGS[settings])).train()


def sharded(model, kind):
    """Wrap a model; return it, and a function that gathers its whole state."""
    if kind == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        assert not any("hiplora_" in name for name in wrapped.named_module_buffers)
        return wrapped, model.state_dict
    if kind == "fsdp2":
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
        from torch.distributed.fsdp import fully_shard

        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return model, lambda: get_model_state_dict(model, options=options)
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    wrapped = FullyShardedDataParallel(
        model,
        auto_wrap_policy=policy if kind == "fsdp1" else fsdp_auto_wrap_policy(model),
        use_orig_params=kind == "fsdp1",
        device_id=torch.device("cpu"),
    )

    def gathered():
        with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT):
            return wrapped.state_dict()

    return wrapped, gathered


def trained(model, gathered, plain, folder, steps, rows=slice(None)):
    """Train on this process's rows of each batch, and save the whole adapter from the first process."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in steps:
        optimizer.zero_grad()
        ids = batch(step)[rows]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    state = {name.removeprefix("module."): value for name, value in gathered().items()}
    if rows.start in (None, 0):
        plain.save_pretrained(folder, state_dict=state)


def member(rank, work, kind, folder):
    """Work as one of two processes."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    work(rank, kind, folder)
    gc.collect()  # were DDP's reducer the last to hold the group, torch could hang in its destructor
    dist.barrier()
    dist.destroy_process_group()


def worker(rank, kind, folder):
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "LlamaDecoderLayer"
    rows = slice(2 * rank, 2 * rank + 2)
    for settings in SETTINGS:
        for begin, steps, name in PARTS:
            plain = started(settings, begin and f"{folder}/{settings}/{begin}")
            model, gathered = sharded(plain, kind)
            trained(model, gathered, plain, f"{folder}/{settings}/{name}", steps, rows)
            if kind.startswith("fsdp1"):
                with pytest.raises(AdapterError, match="FSDP shards its parameters"):
                    hiplora.max_leak(plain)
            else:
                assert hiplora.max_leak(plain) < 1e-5
            torch.distributed.barrier()


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_save_and_carry_on_as_one(tmp_path, kind):
    torch.multiprocessing.spawn(member, args=(worker, kind, str(tmp_path)), nprocs=2)
    assert_as_one(tmp_path, SETTINGS)


def assert_as_one(folder, kinds):
    """Compare what two processes have saved, first and second, with what one trains on the same batches."""
    for settings in kinds:
        found, one = folder / settings, folder / "one" / settings
        for begin, steps, name in PARTS:
            model = started(settings, begin and one / begin)
            trained(model, model.state_dict, model, one / name, steps)
            expected, tensors = (load_file(at / name / "adapter_model.safetensors") for at in (one, found))
            assert expected.keys() == tensors.keys()
            for key, value in expected.items():
                torch.testing.assert_close(tensors[key], value, rtol=1e-3, atol=1e-4, msg=f"{settings}: {key}")
        assert hiplora.max_leak(started(settings, found / "second")) < 1e-5


def mixture():
    """Adapt the experts of a mixture, most of which get no token of one row."""
    torch.manual_seed(0)
    model = tiny_mixture(num_local_experts=8, num_experts_per_tok=1)
    config = {"r": 2, "principal_rank": 4, "lora_dropout": 0.0, "preset": "paper"}
    return peft.get_peft_model(model, hiplora.HipLoraConfig(target_modules=["down_proj"], **config)).train()


def expert_worker(rank, kind, folder):
    plain = mixture()
    model, gathered = sharded(plain, kind)
    trained(model, gathered, plain, f"{folder}/two", range(3), slice(2 * rank, 2 * rank + 2))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_experts_that_get_tokens_in_one_process_only_are_trained_as_in_one(tmp_path, kind):
    torch.multiprocessing.spawn(member, args=(expert_worker, kind, str(tmp_path)), nprocs=2)
    model = mixture()
    trained(model, model.state_dict, model, tmp_path / "one", range(3))
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4, msg=key)


def deepspeed_worker(rank, stage, folder):
    os.environ |= {"LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    import deepspeed

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)  # takes the group that there is
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}}
    config["zero_allow_untested_optimizer"] = True

    def engine(model):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        return deepspeed.initialize(model=model, config=config, optimizer=optimizer)[0]

    def train(model, steps):
        for step in steps:
            ids = batch(step)[2 * rank : 2 * rank + 2]
            model.backward(model(input_ids=ids, labels=ids).loss)
            model.step()

    for settings in UNPRICED:
        for begin, steps, name in PARTS:
            plain = started(settings, begin and f"{folder}/{settings}/{begin}")
            model = engine(plain)
            train(model, steps)
            state = model._zero3_consolidated_16bit_state_dict() if stage == 3 else plain.state_dict()
            if rank == 0:
                plain.save_pretrained(f"{folder}/{settings}/{name}", state_dict=state)
            torch.distributed.barrier()
    with pytest.raises(AdapterError, match="so neither stability_weight nor gain_lr_ratio can act"):
        train(engine(started("paper")), range(2))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_trains_saves_and_carries_on_and_a_budget_that_it_passes_over_is_refused(tmp_path, stage):
    """Its optimizer steps copies of the parameters, and nothing retracts these: the projection is in the pass."""
    pytest.importorskip("deepspeed")
    torch.multiprocessing.spawn(member, args=(deepspeed_worker, stage, str(tmp_path)), nprocs=2)
    assert_as_one(tmp_path, UNPRICED)
