import pytest
import torch
from peft import LoraConfig, PeftModel

import hiplora
from hiplora.adapters import inspect_adapter, read_update, save_as_hiplora
from hiplora.errors import AdapterError
from hiplora.merging import merge
from tests.tiny import save_tiny
from tests.unit.adapters.samples import base_model, deltas, hip_config, leaky, logits, product, saved

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="session")
def folders(tiny_model_dir, tmp_path_factory):
    """Adapters of one base model, trained apart, by name."""
    root = tmp_path_factory.mktemp("native")
    configs = {
        "one": hip_config(),
        "two": hip_config(),
        "three": hip_config(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"]),
        "patterns": hip_config(
            rank_pattern={"layers.1.self_attn.q_proj": 7},
            alpha_pattern={"v_proj": 3},
            principal_rank_pattern={"o_proj": 2},
        ),
        "proj": hip_config(principal_channel=False),
        "proj of q": hip_config(principal_channel=False, target_modules=["q_proj"]),
        "free": hip_config(residual_projection=False),
        "lora": LoraConfig(r=3, target_modules=["up_proj"]),
    }
    return {
        name: saved(tiny_model_dir, root / name, config, seed=i)[0] for i, (name, config) in enumerate(configs.items())
    }


def activation(base_dir, path, seed, **changes):
    """An adapter of the activation basis, calibrated on a few random rows."""
    config = hip_config(basis="activation", **changes)
    rows = torch.randint(0, 256, (6, 40), generator=torch.Generator().manual_seed(0))
    hiplora.calibrate(base_model(base_dir), config, rows=rows)
    return saved(base_dir, path, config, seed)[0]


def assert_loads_as(update, folder, base_dir):
    loaded = PeftModel.from_pretrained(base_model(base_dir), folder).eval()
    found = deltas(loaded)
    assert set(found) == set(update.factors)
    for module, delta in found.items():
        torch.testing.assert_close(delta, product(update, module), rtol=1e-5, atol=1e-6)
    assert (logits(loaded) - logits(base_model(base_dir))).abs().max() > 1e-2


@pytest.mark.parametrize(
    "names",
    [["one", "two", "three"], ["patterns"], ["one", "proj"], ["three", "proj of q"], ["free", "one"]],
    ids=" + ".join,
)
def test_peft_loads_what_was_written_as_the_merge(folders, tiny_model_dir, tmp_path, names):
    update = merge([folders[name] for name in names], weights=[1.0, -0.5, 2.0][: len(names)])
    report = save_as_hiplora(update, tmp_path / "out")
    assert report["largest_difference"]["relative"] < 1e-6
    assert report["logit_difference"] < 1e-5
    assert_loads_as(update, tmp_path / "out", tiny_model_dir)


def test_gains_are_kept_apart_and_can_be_merged_again(folders, tmp_path):
    merged = merge([folders["one"], folders["two"]])
    save_as_hiplora(merged, tmp_path / "out")
    again = read_update(tmp_path / "out")
    assert (again.kind, again.fingerprints) == ("hiplora", merged.fingerprints)
    for module, channels in again.channels.items():
        assert torch.equal(channels.delta, merged.channels[module].delta)
    assert merge([tmp_path / "out", folders["three"]]).ranks[Q0] == 4 + 4 + 2 + 6
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(AdapterError, match="not the one that this adapter was made for"):
        PeftModel.from_pretrained(base_model(other), tmp_path / "out")


@pytest.mark.parametrize("changes", [{}, {"projection": "soft"}, {"principal_channel": False}])
def test_the_activation_basis_is_kept_with_its_calibration(tiny_model_dir, tmp_path, changes):
    folder = activation(tiny_model_dir, tmp_path / "one", 0, **changes)
    update = merge([folder], weights=[0.5])
    save_as_hiplora(update, tmp_path / "out")
    assert_loads_as(update, tmp_path / "out", tiny_model_dir)
    config, original = read_update(tmp_path / "out").config, read_update(folder).config
    for key in ("basis", "basis_sides", "calibration", "base_precision", "fingerprints"):
        assert config[key] == original[key]
    alone, merged = inspect_adapter(folder), inspect_adapter(merge([folder]))
    for one, other in zip(alone["modules"], merged["modules"], strict=True):
        assert other["left"] == pytest.approx(one["left"], rel=1e-4)


def test_an_update_that_is_no_hiplora_adapter_is_refused_and_nothing_written(folders, tiny_model_dir, tmp_path):
    sides = [
        saved(tiny_model_dir, tmp_path / name, hip_config(target_modules=[name], basis_sides=side))[0]
        for name, side in {"q_proj": "both", "v_proj": "input"}.items()
    ]
    other, _ = saved(tiny_model_dir, tmp_path / "other", hip_config(principal_rank=4, target_modules=["o_proj"]))
    leaking, module = leaky(tiny_model_dir, tmp_path / "leaky")
    for update, why in (
        (merge([folders["one"], folders["lora"]]), r"layers\.0\.mlp\.up_proj: .*save it as plain LoRA"),
        (merge([folders["one"], other]), r"o_proj: .*no two channels in one"),
        (merge(sides), r"v_proj: .*protects the sides 'input' there, but 'both' elsewhere"),
        (read_update(leaking), f"{module} leaks"),
    ):
        with pytest.raises(AdapterError, match=why):
            save_as_hiplora(update, tmp_path / "out")
        assert not (tmp_path / "out").exists()
