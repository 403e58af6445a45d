import json

import pytest
import torch
from peft import LoraConfig, PeftModel

import hiplora
from hiplora.adapters import inspect_adapter, read_update, save_as_hiplora
from hiplora.errors import AdapterError, ConfigError
from hiplora.merging import merge, save_merged
from hiplora.tuner.moments import CalibrationStore
from tests.tiny import save_tiny
from tests.unit.adapters.samples import (
    base_model,
    deltas,
    hip_config,
    leaky,
    logits,
    product,
    save_tiny_gpt2,
    saved,
)

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
        name: saved(tiny_model_dir, root / name, config, seed=i)[0]
        for i, (name, config) in enumerate(configs.items())
    }


def activation(base_dir, path, seed, **changes):
    """An adapter of the activation basis, calibrated on a few random rows."""
    config = hip_config(basis="activation", **changes)
    rows = torch.randint(0, 256, (6, 40), generator=torch.Generator().manual_seed(0))
    store = CalibrationStore(path.with_name("store"))
    hiplora.calibrate(base_model(base_dir), config, rows=rows, store=store)
    return saved(base_dir, path, config, seed)[0]


def assert_loads_as_the_merge(update, folder, base_dir):
    loaded = PeftModel.from_pretrained(base_model(base_dir), folder).eval()
    assert {type(module).__name__ for module in loaded.modules()} & {"HipLoraLinear"}
    found = deltas(loaded)
    assert set(found) == set(update.factors)
    for module, delta in found.items():
        torch.testing.assert_close(delta, product(update, module), rtol=1e-5, atol=1e-6)
    stock = PeftModel.from_pretrained(base_model(base_dir), folder.with_name("lora")).eval()
    torch.testing.assert_close(logits(loaded), logits(stock), rtol=1e-5, atol=1e-5)
    assert (logits(loaded) - logits(base_model(base_dir))).abs().max() > 1e-2


@pytest.mark.parametrize(
    "names",
    [
        ["one"],
        ["one", "two"],
        ["one", "two", "three"],
        ["three"],
        ["patterns"],
        ["patterns", "patterns"],
        ["proj"],
        ["one", "proj"],
        ["three", "proj of q"],
        ["free", "one"],
    ],
    ids=" + ".join,
)
def test_peft_loads_what_was_written_as_the_merge(folders, tiny_model_dir, tmp_path, names):
    update = merge([folders[name] for name in names], weights=[1.0, -0.5, 2.0][: len(names)])
    report = save_as_hiplora(update, tmp_path / "out")
    save_merged(update, tmp_path / "lora")
    assert report.worst[1] < 1e-6
    assert report.logits is not None
    assert report.logits < 1e-5
    assert_loads_as_the_merge(update, tmp_path / "out", tiny_model_dir)


def test_gains_are_kept_apart_and_can_be_merged_again(folders, tmp_path):
    merged = merge([folders["one"], folders["two"]])
    save_as_hiplora(merged, tmp_path / "out")
    again = read_update(tmp_path / "out")
    assert again.kind == "hiplora"
    assert again.fingerprints == merged.fingerprints
    assert set(again.ranks.values()) == {4 + 4 + 6}
    for module, channels in again.channels.items():
        assert torch.equal(channels.delta, merged.channels[module].delta)
        assert torch.equal(channels.U, merged.channels[module].U)
    twice = merge([tmp_path / "out", folders["three"]])
    assert twice.rank(Q0) == 4 + 4 + 2 + 6


def test_a_merge_of_gains_with_projections_has_zero_gains_where_there_were_none(folders, tmp_path):
    save_as_hiplora(merge([folders["proj of q"], folders["three"]]), tmp_path / "a")
    gains = {m: c.delta for m, c in read_update(tmp_path / "a").channels.items()}
    assert gains[Q0].any()
    other = hip_config(target_modules=["v_proj"])
    folder, _ = saved(read_update(folders["one"]).base, tmp_path / "v", other)
    save_as_hiplora(merge([folders["proj of q"], folder]), tmp_path / "b")
    gains = {m: c.delta for m, c in read_update(tmp_path / "b").channels.items()}
    assert not gains[Q0].any()
    assert gains[Q0.replace("q_proj", "v_proj")].any()


def test_the_activation_basis_is_kept_with_what_it_was_measured_on(tiny_model_dir, tmp_path):
    one, two = (activation(tiny_model_dir, tmp_path / name, i) for i, name in enumerate(("one", "two")))
    update = merge([one, two])
    save_as_hiplora(update, tmp_path / "out")
    save_merged(update, tmp_path / "lora")
    assert_loads_as_the_merge(update, tmp_path / "out", tiny_model_dir)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    original = json.loads((one / "adapter_config.json").read_text())
    assert config["basis"] == "activation"
    for key in ("basis_sides", "calibration", "base_precision", "fingerprints"):
        assert config[key] == original[key]
    assert config["calibration"]["tokens"] == 240


@pytest.mark.parametrize("gains", [True, False])
def test_a_soft_projection_is_written_as_what_it_does(tiny_model_dir, tmp_path, gains):
    folder = activation(tiny_model_dir, tmp_path / "one", 0, projection="soft", principal_channel=gains)
    update = merge([folder], weights=[0.5])
    save_as_hiplora(update, tmp_path / "out")
    save_merged(update, tmp_path / "lora")
    assert_loads_as_the_merge(update, tmp_path / "out", tiny_model_dir)


def test_a_merge_in_the_activation_basis_is_inspected_on_the_weights_own_directions(tiny_model_dir, tmp_path):
    folder = activation(tiny_model_dir, tmp_path / "one", 0)
    alone, merged = inspect_adapter(folder), inspect_adapter(merge([folder]))
    for one, other in zip(alone["modules"], merged["modules"], strict=True):
        assert other["left"] == pytest.approx(one["left"], rel=1e-4)
        assert other["sigma"] == pytest.approx(one["sigma"], rel=1e-4)


def test_another_base_model_is_refused_on_load(folders, tmp_path):
    save_as_hiplora(merge([folders["one"], folders["two"]]), tmp_path / "out")
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(AdapterError, match="not the one that this adapter was made for"):
        PeftModel.from_pretrained(base_model(other), tmp_path / "out")


def test_transposed_layers_and_modules_saved_whole(tmp_path):
    base = save_tiny_gpt2(tmp_path / "gpt2")
    config = hip_config(target_modules=["c_attn", "c_proj"], modules_to_save=["ln_f"])
    folder, model = saved(base, tmp_path / "a", config)
    save_as_hiplora(merge([folder]), tmp_path / "out")
    loaded = PeftModel.from_pretrained(base_model(base), tmp_path / "out").eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


def test_the_card_and_the_record_say_what_it_is(folders, tmp_path):
    save_as_hiplora(merge([folders["one"], folders["two"]]), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# HiP-LoRA adapter, exported from a merge of several adapters" in card
    assert "import hiplora" in card
    assert json.loads((tmp_path / "out" / "export.json").read_text())["to"] == "hiplora"


# What is no HiP-LoRA adapter


def test_a_module_without_channels_is_named_and_nothing_is_written(folders, tmp_path):
    with pytest.raises(AdapterError, match=r"layer model\.layers\.0\.mlp\.up_proj: .*save it as plain LoRA"):
        save_as_hiplora(merge([folders["one"], folders["lora"]]), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_channels_in_two_bases_are_none_in_one(folders, tiny_model_dir, tmp_path):
    other, _ = saved(
        tiny_model_dir, tmp_path / "other", hip_config(principal_rank=4, target_modules=["o_proj"])
    )
    with pytest.raises(
        AdapterError, match=r"layer model\.layers\.0\.self_attn\.o_proj: .*no two channels in one"
    ):
        save_as_hiplora(merge([folders["one"], other]), tmp_path / "out")


def test_modules_that_protect_different_sides_are_no_one_adapter(tiny_model_dir, tmp_path):
    sides = {"q_proj": "both", "v_proj": "input"}
    parts = [
        saved(tiny_model_dir, tmp_path / name, hip_config(target_modules=[name], basis_sides=side))[0]
        for name, side in sides.items()
    ]
    with pytest.raises(
        AdapterError, match=r"v_proj: .*protects the sides 'input' there, but 'both' of .*q_proj"
    ):
        save_as_hiplora(merge(parts), tmp_path / "out")


def test_a_leaky_adapter_is_refused(tiny_model_dir, tmp_path):
    folder, module = leaky(tiny_model_dir, tmp_path / "a")
    with pytest.raises(AdapterError, match=f"{module} leaks"):
        save_as_hiplora(read_update(folder), tmp_path / "out")


def test_a_folder_that_exists_is_kept_unless_told_otherwise(folders, tmp_path):
    update = merge([folders["one"]])
    save_as_hiplora(update, tmp_path / "out")
    with pytest.raises(ConfigError, match="--overwrite"):
        save_as_hiplora(update, tmp_path / "out")
    save_as_hiplora(update, tmp_path / "out", overwrite=True)
