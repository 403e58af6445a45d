import warnings

import peft
import pytest
import torch

from hiplora.adapters import AdapterUpdate
from hiplora.errors import AdapterError, ConfigError
from hiplora.evaluation.drift import BaseReference, measure_drift
from hiplora.evaluation.mounting import applied, check_adapters, load_model, mounted, name_adapters
from tests.tiny import save_tiny, tiny_llama, tiny_tokenizer
from tests.unit.adapters.samples import PROMPTS, edit_config, edit_tensors, logits

UP = "model.layers.{}.mlp.up_proj"


def lora_folder(path, init=False, target="q_proj"):
    config = peft.LoraConfig(r=4, target_modules=[target], init_lora_weights=init)
    peft.get_peft_model(tiny_llama(), config).save_pretrained(path)
    return path


def change_of(matrices):
    """An update of given matrices (m, n)."""
    factors = {name: (torch.eye(matrix.shape[1]), matrix) for name, matrix in matrices.items()}
    return AdapterUpdate("the base", "lora", {}, factors)


def test_an_adapter_acts_while_it_is_mounted_and_leaves_the_bare_model(tmp_path):
    model, tokenizer = load_model(str(save_tiny(tmp_path / "base")))
    before, folder = logits(model), lora_folder(tmp_path / "lora")
    with mounted(model, folder) as adapted:
        assert not torch.equal(logits(adapted), before)
    assert torch.equal(logits(model), before)
    assert not hasattr(model, "peft_config")
    check_adapters(model, tokenizer, ["a prompt", ""], {"lora": mounted(model, folder)})
    assert torch.equal(logits(model), before)


A1 = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
# What is wrong with the folder itself is in tests/unit/adapters/test_read.py: the reader is the same.
DAMAGE = [
    (lambda tensors: tensors.update({A1: tensors[A1][:, :3]}), {}, "size mismatch"),
    (lambda tensors: tensors[A1].fill_(float("nan")), {}, "values are NaN or Inf"),
    (lambda tensors: tensors.pop(A1), {}, "missing adapter"),
    (lambda tensors: tensors.update({A1.replace("s.1", "s.7"): tensors[A1].clone()}), {}, "no place for .*s.7"),
    (lambda tensors: None, {"exclude_modules": "["}, "no regular expression"),
    (lambda tensors: None, {"peft_type": "NOPE"}, "cannot be put on the model"),
    (lambda tensors: None, {"peft_type": "PROMPT_TUNING"}, "changes what the model reads"),
]


@pytest.mark.parametrize(("damage", "settings", "said"), DAMAGE)
def test_an_adapter_that_is_damaged_or_of_another_model_is_refused_by_name(tmp_path, damage, settings, said):
    edit_tensors(lora_folder(tmp_path), damage)
    edit_config(tmp_path, **settings)
    with pytest.raises(AdapterError, match=f"{tmp_path}.*{said}"), mounted(tiny_llama(), tmp_path):
        pass


@pytest.mark.parametrize(
    "config",
    [
        peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"]),  # its r is 0
        peft.LoHaConfig(target_modules=["q_proj"]),
        peft.VeraConfig(target_modules=["q_proj"]),
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        peft.LoraConfig(target_modules=["q_proj"], use_dora=True),
        peft.TrainableTokensConfig(token_indices=[int(PROMPTS[0, 0])], target_modules=["embed_tokens"]),
        peft.PolyConfig(target_modules=["q_proj"]),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_adapters_of_any_method_that_reads_text_are_measured_and_others_named(tmp_path, config):
    adapted = peft.get_peft_model(tiny_llama(), config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter += 0.1 * parameter.requires_grad * torch.randn(parameter.shape)
    adapted.save_pretrained(tmp_path)
    bare, model = logits(tiny_llama()), tiny_llama()
    if config.peft_type == "POLY":  # it asks for the task of every row
        with pytest.raises(AdapterError, match=r"POLY fails on plain text .*task_ids"), mounted(model, tmp_path):
            pass
    else:
        with mounted(model, tmp_path) as present:
            assert not torch.equal(logits(present), bare)
    assert torch.equal(logits(model), bare)


def test_an_adapter_over_a_base_of_another_name_warns(tmp_path):
    model, folder = load_model(str(save_tiny(tmp_path / "base")))[0], lora_folder(tmp_path / "lora")
    for name, warned in ((str(tmp_path / "base"), 0), ("hub/base", 0), ("hub/other", 1)):
        edit_config(folder, base_model_name_or_path=name)
        with warnings.catch_warnings(record=True) as caught, mounted(model, folder):
            pass
        assert len([one for one in caught if "hub/other, and is put on" in str(one.message)]) == warned


def test_factors_that_overflow_are_an_error_and_no_score(tmp_path):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    edit_tensors(lora_folder(tmp_path, target="up_proj"), lambda tensors: [t.mul_(1e30) for t in tensors.values()])
    with pytest.raises(AdapterError, match="mine: makes the model's logits NaN or Inf"):
        check_adapters(model, tokenizer, ["a prompt"], {"mine": mounted(model, tmp_path)})
    reference = BaseReference.build(model, tokenizer, {"a": "some text"})
    with pytest.raises(AdapterError, match="NaN or Inf on the text 'a'"), mounted(model, tmp_path) as adapted:
        measure_drift(adapted, reference)


def test_pissa_that_was_not_converted_is_caught(tmp_path):
    """Loaded anew, it subtracts its start from the base weights, which then are not the base's any more."""
    model, folder = tiny_llama(), lora_folder(tmp_path, init="pissa")
    with pytest.raises(AdapterError, match="mine: with the adapter off the model is not the base bit for bit"):
        check_adapters(model, tiny_tokenizer(), ["a prompt"], {"mine": mounted(model, folder)})


def test_an_update_is_added_and_the_very_same_weights_come_back_also_after_an_error():
    model, name = tiny_llama(), UP.format(0)
    weight, before = model.get_submodule(name).weight, logits(model)
    change = torch.randn(weight.shape)
    with applied(model, change_of({name: change})) as changed:
        assert torch.equal(model.get_submodule(name).weight, weight + change)
        assert not torch.equal(logits(changed), before)
    misfit = change_of({name: torch.ones(96, 64), UP.format(1): torch.ones(3, 3)})
    with pytest.raises(AdapterError, match=UP.format(1)), applied(model, misfit):
        pass
    assert model.get_submodule(name).weight is weight
    assert torch.equal(logits(model), before)


def test_a_tied_output_head_leaves_the_embeddings_alone():
    model = tiny_llama(tie=True)
    embedded = model.get_input_embeddings().weight.clone()
    change = torch.ones_like(embedded)
    with applied(model, change_of({"lm_head": change})):
        assert torch.equal(model.get_input_embeddings().weight, embedded)
        assert torch.equal(model.lm_head.weight, embedded + change)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_folder_is_called_by_its_own_name_or_by_the_given_one_which_nothing_else_has(tmp_path):
    for name in ("a/maths", "b/maths", "x=y"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "adapter_config.json").write_text("{}")
    maths, other = tmp_path / "a/maths", tmp_path / "b/maths"
    assert list(name_adapters([maths, f"law={other}", str(tmp_path / "x=y")])) == ["maths", "law", "x=y"]
    for names, said in (
        ([f"base={maths}"], "is taken"),
        ([maths, other], "is taken"),
        ([tmp_path / "a"], r"holds no adapter_config\.json"),
        (["one=nowhere"], "nowhere: no such folder"),
    ):
        with pytest.raises(ConfigError, match=said):
            name_adapters(names)
