"""Models of which something is refused, or left out of the presets, or that are built unlike all others."""

import ast
from types import SimpleNamespace

import peft
import pytest
import torch
from transformers import AutoModelForImageClassification

import hiplora
from hiplora import HipLoraConfig
from hiplora.adapters import save_dense
from hiplora.errors import AdapterError, ConfigError, FactorError
from hiplora.tuner import default_targets
from tests.models.zoo import CASE, VOCABULARY

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", ["Longformer", "XLNet"])
@pytest.mark.parametrize("length", [8, 12])
def test_rows_that_a_layer_does_not_see_in_front_cannot_have_their_own_adapters(name, length):
    case = CASE[name]
    made = HipLoraConfig(preset="paper", r=2, principal_rank=4, target_modules=["query", "layer_1"])
    model = peft.get_peft_model(case.make(), made)
    ids = torch.randint(3, VOCABULARY, (8, length))
    with pytest.raises(AdapterError, match="one row of the batch after the other"):
        model.eval()(input_ids=ids, adapter_names=["default", "__base__"] * 4)


@pytest.mark.parametrize(
    ("name", "preset", "expected"),
    [
        ("NLLB-MoE", "function-aware", {"fc1", "fc2"}),
        ("HunYuan-MoE", "function-aware", {"gate_up_proj", "gate_proj", "up_proj", "down_proj"}),
        ("JetMoE", "paper", {"kv_proj"}),
        ("LXMERT", "function-aware", {"intermediate.dense", "0.output.dense"}),
    ],
)
def test_a_preset_leaves_out_what_only_lies_in_an_mlp(name, preset, expected):
    assert set(default_targets(CASE[name].make(), preset)) == expected


def test_experts_that_cannot_be_adapted_leave_no_default():
    with pytest.raises(ConfigError, match="no MLP projections were recognised"):
        default_targets(CASE["JetMoE"].make())


@pytest.mark.parametrize("targets", ["all-linear", default_targets(CASE["DeepSeek-V3.2"].make(), "paper")])
def test_layers_without_gradients_are_named_so_that_they_can_be_left_out(targets):
    """An indexer picks the tokens to attend to, and no gradient passes through its choice."""
    case = CASE["DeepSeek-V3.2"]
    model = case.make()
    made = HipLoraConfig(r=2, principal_rank=4, target_modules=targets)
    with pytest.raises(FactorError, match="no gradient reached it") as caught:
        hiplora.calibrate(model, made, lambda: model(**case.batch(model)))
    made.exclude_modules = ast.literal_eval(str(caught.value).partition("exclude_modules=")[2])
    hiplora.calibrate(model, made, lambda: model(**case.batch(model)))
    assert made.calibrated
    assert not any("indexer" in name for name in made.calibrated)


@pytest.mark.parametrize("merge", ["merge_and_unload", "unload"])
def test_a_classifiers_head_of_several_layers_is_unloaded(merge):
    case = CASE["RoBERTa classifier"]
    model = peft.get_peft_model(case.make(), HipLoraConfig(preset="paper", r=2, principal_rank=4, task_type=case.task))
    expected = model(**case.batch(model)).logits
    bare = getattr(model, merge)()
    assert {name for name, _ in bare.named_parameters()} == {name for name, _ in case.make().named_parameters()}
    assert torch.allclose(bare(**case.batch(bare)).logits, expected, atol=1e-6)


def test_a_model_whose_embeddings_transformers_does_not_find_is_exported(tmp_path):
    case = CASE["MobileViT"]
    case.make().save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(case.make(), HipLoraConfig(preset="paper", r=2, principal_rank=4))
    model.save_pretrained(tmp_path / "adapter")
    save_dense(tmp_path / "adapter", path=tmp_path / "dense", base=str(tmp_path / "base"))
    dense = AutoModelForImageClassification.from_pretrained(tmp_path / "dense").eval()
    assert torch.allclose(dense(**case.batch(model)).logits, model(**case.batch(model)).logits, atol=1e-5)


def test_a_state_that_is_written_in_place_is_left_off_while_gradients_are_taken():
    model = CASE["RWKV"].make()
    made = HipLoraConfig(r=2, principal_rank=4)
    hiplora.calibrate(model, made, lambda: model(**CASE["RWKV"].batch(model)))
    assert made.calibrated


def test_a_model_that_overwrites_what_its_gradients_need_is_told_the_way_out():
    class Overwriting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"fc1": torch.nn.Linear(16, 16)})])

        def forward(self, x):
            y = self.layers[0]["fc1"](x).exp()
            kept = y.square()
            y.zero_()
            return SimpleNamespace(logits=kept)

    model = Overwriting()
    with pytest.raises(ConfigError, match=r"in place.*basis_sides='input'"):
        hiplora.calibrate(model, HipLoraConfig(r=2, principal_rank=4), lambda: model(torch.randn(2, 3, 16)))
