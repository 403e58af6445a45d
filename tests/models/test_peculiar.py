"""Models of which something is refused, or left out of the presets."""

from types import SimpleNamespace

import peft
import pytest
import torch

import hiplora
from hiplora import HipLoraConfig
from hiplora.errors import AdapterError, ConfigError
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
