"""What PEFT's clients do with an adapter: TRL's references, transformers' own interface, mixed batches."""

import json
import math
import re

import peft
import pytest
import torch
from accelerate import cpu_offload
from datasets import Dataset
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hiplora
from hiplora import HipLoraConfig
from hiplora.adapters import read_update
from hiplora.errors import AdapterError
from hiplora.tuner import hip_layers
from tests.contract.conftest import logits, train
from tests.tiny import tiny_tokenizer

PRESETS = {
    "paper": {"preset": "paper"},
    "function-aware": {"preset": "function-aware", "target_modules": ["q_proj", "down_proj"]},
}


@pytest.fixture(params=PRESETS)
def preset(request):
    return PRESETS[request.param]


def copy_as_trl_does(model):
    """Make TRL's frozen reference of the adapter: everything with `.default.` in its name is copied."""
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in list(model.named_parameters()):
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)


@pytest.mark.parametrize("from_folder", [True, False])
def test_trls_reference_is_the_trained_adapter(tiny, ids, tmp_path, preset, from_folder):
    model = tiny.trained(ids, **preset, modules_to_save=["norm"])
    if from_folder:
        model.save_pretrained(tmp_path)
        model = peft.PeftModel.from_pretrained(tiny.make(), tmp_path, is_trainable=True)
    policy = logits(model, ids)
    copy_as_trl_does(model)
    model.set_adapter("ref")
    assert torch.equal(logits(model, ids), policy)
    for _, layer in hip_layers(model):
        assert layer.hiplora_V["ref"].data_ptr() == layer.hiplora_V["default"].data_ptr()
    model.set_adapter("default")
    train(model, ids)
    model.set_adapter("ref")
    assert torch.equal(logits(model, ids), policy)


@pytest.mark.parametrize("how", ["beside", "alone", "transformers"])
def test_a_loaded_configuration_makes_a_fresh_adapter(tiny, ids, tmp_path, preset, how):
    model = tiny.adapted(**preset)
    model.save_pretrained(tmp_path)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    if how == "beside":
        model.add_adapter("fresh", config)
        model.set_adapter("fresh")
    elif how == "transformers":
        model = tiny.make()
        model.add_adapter(config, "fresh")
        with pytest.warns(UserWarning, match="'fresh' has a configuration from a file.*begins anew"):
            logits(model, ids)
    else:
        model = peft.get_peft_model(tiny.make(), config)
    assert torch.equal(logits(model, ids), logits(tiny.make(), ids))
    losses = train(model, ids)
    assert losses[-1] < losses[0]
    assert hiplora.max_leak(model) < 1e-6


def rename(folder, renamed):
    file = folder / "adapter_model.safetensors"
    save_file({renamed(name): tensor for name, tensor in load_file(file).items()}, file)


WRAPPED = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "DDP": lambda name: f"module.{name}",
    "DDP of the base": lambda name: name.replace("base_model.model.", "base_model.model.module."),
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name}",
    "FSDP of a layer": lambda name: name.replace(".layers.0.", ".layers.0._fsdp_wrapped_module."),
    "checkpointing": lambda name: name.replace(".layers.1.", ".layers.1._checkpoint_wrapped_module."),
    "a state dict": lambda name: re.sub(r"(hiplora_[A-Za-z]+)(\.weight)?$", r"\1.default\2", name),
    "no prefix": lambda name: name.removeprefix("base_model.model."),
}


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_an_adapter_file_loads_under_the_names_of_wrappers(tiny, ids, tmp_path, preset, wrapped):
    model = tiny.trained(ids, **preset)
    model.save_pretrained(tmp_path / "as saved")
    model.save_pretrained(tmp_path / "wrapped")
    rename(tmp_path / "wrapped", WRAPPED[wrapped])
    loaded = peft.PeftModel.from_pretrained(tiny.make(), tmp_path / "wrapped")
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    again, expected = (read_update(tmp_path / folder).factors for folder in ("wrapped", "as saved"))
    torch.testing.assert_close(again, expected, rtol=0, atol=0)


def test_a_model_with_a_part_called_module_keeps_its_names(tmp_path):
    def make():
        torch.manual_seed(0)
        return torch.nn.ModuleDict({"module": torch.nn.Linear(16, 12)})

    config = HipLoraConfig(preset="paper", r=2, principal_rank=4, target_modules=["module"], init_weights=False)
    model = peft.get_peft_model(make(), config)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path)
    for (_, one), (_, other) in zip(hip_layers(model), hip_layers(loaded), strict=True):
        assert torch.equal(one.get_delta_weight("default"), other.get_delta_weight("default"))


def test_an_adapter_file_of_0_1_still_loads(tiny, ids, tmp_path, preset):
    model = tiny.trained(ids, **preset)
    model.save_pretrained(tmp_path)
    old = {n.removesuffix(".weight") if "hiplora_" in n else n: t.clone() for n, t in model.state_dict().items()}
    rename(tmp_path, lambda name: name.removesuffix(".weight"))
    assert torch.equal(logits(peft.PeftModel.from_pretrained(tiny.make(), tmp_path), ids), logits(model, ids))
    fresh = tiny.adapted(**preset)
    fresh.load_state_dict(old)
    assert torch.equal(logits(fresh, ids), logits(model, ids))


def test_transformers_own_interface_loads_adds_trains_and_saves(tiny, ids, tmp_path, preset):
    tiny.make().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.add_adapter(tiny.config(**preset), "default")
    train(model, ids)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    for again in (tiny.make(), AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()):
        if not getattr(again, "peft_config", {}):
            again.load_adapter(tmp_path / "adapter")
        assert torch.equal(logits(again, ids), expected)
        again.delete_adapter("default")
    rename(tmp_path / "adapter", lambda name: name.removesuffix(".weight"))
    with pytest.raises(AdapterError, match=r"q_proj: .*PeftModel\.from_pretrained"):
        tiny.make().load_adapter(tmp_path / "adapter")


def test_an_adapter_inside_another_tuners_layers_is_saved_under_its_own_names(tiny, ids, tmp_path, preset):
    model = tiny.make()
    model.add_adapter(tiny.config(**preset, relative_gains=preset["preset"] == "paper"), "default")
    train(model, ids)
    expected = logits(model, ids)
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "around")
    model.set_adapter("default")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(tiny.make(), tmp_path), ids), expected)


def test_an_adapted_model_computes_and_merges_the_same_when_offloaded(tiny, ids, preset):
    model = tiny.adapted(**preset, init_weights=False)
    expected = logits(model, ids)
    cpu_offload(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model, ids), expected)
    torch.testing.assert_close(logits(model.merge_and_unload(), ids), expected)


def test_the_type_is_what_peft_and_transformers_expect(tiny, tmp_path):
    model = tiny.adapted()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "HIPLORA"
    assert peft.get_model_status(model).peft_types == {"default": "HIPLORA"}
    with pytest.raises(AdapterError, match=r"hiplora\.merging\.merge"):
        model.add_weighted_adapter(["default"], [0.5], "half")
    with pytest.raises(ValueError, match="'HIPLORA' is not compatible"):
        peft.get_peft_model(tiny.make(), tiny.config(), mixed=True)


def test_other_adapters_and_pefts_helpers_find_their_way_around_a_layer(tiny, ids, preset):
    model = tiny.adapted(**preset, init_weights=False)
    expected = logits(model, ids)
    with disable_input_dtype_casting(model):
        assert torch.equal(logits(model, ids), expected)
    around = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert torch.equal(logits(around, ids), expected)


NAMES = ["default", "b", "__base__", "b"]


@pytest.fixture
def several(tiny):
    settings = {"init_weights": False, "modules_to_save": ["lm_head"]}
    model = tiny.adapted(**settings)
    model.add_adapter("b", tiny.config(**settings, r=2, principal_rank=3, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        model.get_submodule("base_model.model.lm_head").modules_to_save["default"].weight.mul_(1.5)
    return model.eval()


def alone(model, name, run):
    if name == "__base__":
        with model.disable_adapter():
            return run()
    model.set_adapter(name)
    return run()


@pytest.mark.parametrize("beams", [0, 1, 2])
def test_each_row_of_a_mixed_batch_goes_through_its_own_adapter(several, beams):
    ids = torch.randint(0, 256, (4, 7), generator=torch.Generator().manual_seed(1))

    def run(**names):
        if not beams:
            with torch.no_grad():
                return several(input_ids=ids, **names).logits
        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "num_beams": beams, **names}
        return several.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)

    mixed = run(adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(mixed[row], alone(several, name, run)[row])


@pytest.mark.parametrize(
    ("names", "prepare", "message"),
    [
        (["default", "c"], "eval", r"non-existing adapter.*c.*b, default"),
        (["default"], "eval", "Length of `adapter_names`"),
        (["default", "b"], "train", "training mode"),
        (["default", "b"], "merge_adapter", "merged"),
    ],
)
def test_a_mixed_batch_that_cannot_be_computed_is_refused(several, ids, names, prepare, message):
    getattr(several, prepare)()
    with pytest.raises(AdapterError, match=message):
        several(input_ids=ids, adapter_names=names)


def trl_trainer(method, model, tokenizer, folder, **settings):
    """Make one of TRL's trainers that compare a trained adapter with a frozen copy of it."""
    import trl

    words = {"chosen": "on the floor", "rejected": "nowhere", "completion": "on the floor"}
    rows = [{"prompt": f"where is {i}", "label": bool(i % 2), **words} for i in range(8)]
    keys, rewards = {"DPO": ["prompt", "chosen", "rejected"], "KTO": ["prompt", "completion", "label"]}, {}
    if method in ("GRPO", "RLOO"):
        settings |= {"beta": 0.04, "num_generations": 2, "max_completion_length": 4}
        rewards = {"reward_funcs": lambda completions, **_: [float(len(set(text))) for text in completions]}
    settings |= {"output_dir": str(folder), "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True}
    settings |= {"save_strategy": "no", "max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1}
    return getattr(trl, f"{method}Trainer")(
        model=model,
        args=getattr(trl, f"{method}Config")(**settings),
        train_dataset=Dataset.from_list(rows).select_columns(keys.get(method, ["prompt"])),
        processing_class=tokenizer,
        **rewards,
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["DPO", "KTO", "GRPO", "RLOO"])
def test_trls_trainers_start_from_the_trained_adapter(tiny, ids, tmp_path, preset, method):
    model = tiny.trained(ids, **preset, lora_dropout=0.3)
    model.save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(tiny.make(), tmp_path, is_trainable=True)
    policy = logits(model, ids)
    trainer = trl_trainer(method, model, tiny_tokenizer(), tmp_path / "out", learning_rate=1e-2)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    if method == "DPO":
        assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
        assert losses[1] < losses[0]
    assert not torch.equal(logits(model.eval(), ids), policy)
    model.base_model.set_adapter("ref")
    torch.testing.assert_close(logits(model, ids), policy, rtol=1e-5, atol=1e-6)  # projected once more, or once less
    assert hiplora.max_leak(model) < 1e-6
