import pytest
import torch
from peft import PeftModel

from hiplora.adapters import inspect_adapter, read_update, save_as_hiplora
from hiplora.errors import AdapterError
from hiplora.merging import merge
from tests.tiny import save_tiny
from tests.unit.adapters.samples import Q0, assert_is, base_model, deltas, hip_config, leaky, saved


def assert_loads_as(update, folder, base_dir):
    assert_is(update, deltas(PeftModel.from_pretrained(base_model(base_dir), folder).eval()))


@pytest.mark.parametrize(
    "names",
    [["one", "two", "three"], ["hip patterns"], ["one", "proj"], ["three", "proj"], ["free", "one"]],
    ids=" + ".join,
)
def test_peft_loads_what_was_written_as_the_merge(adapters, tmp_path, names):
    update = merge([adapters[name] for name in names], weights=[1.0, -0.5, 2.0][: len(names)])
    report = save_as_hiplora(update, tmp_path / "out")
    assert report["largest_difference"]["relative"] < 1e-6
    assert report["logit_difference"] < 1e-5
    assert_loads_as(update, tmp_path / "out", adapters.base)


def test_gains_are_kept_apart_and_can_be_merged_again(adapters, tmp_path):
    merged = merge([adapters["one"], adapters["two"]])
    save_as_hiplora(merged, tmp_path / "out")
    again = read_update(tmp_path / "out")
    assert (again.kind, again.fingerprints) == ("hiplora", merged.fingerprints)
    for module, channels in again.channels.items():
        assert torch.equal(channels.delta, merged.channels[module].delta)
    assert merge([tmp_path / "out", adapters["three"]]).ranks[Q0] == 4 + 4 + 2 + 6
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(AdapterError, match="not the one that this adapter was made for"):
        PeftModel.from_pretrained(base_model(other), tmp_path / "out")


@pytest.mark.parametrize("changes", [{}, {"projection": "soft"}, {"principal_channel": False}])
def test_the_activation_basis_is_kept_with_its_calibration(tiny_model_dir, tmp_path, changes):
    folder, _ = saved(tiny_model_dir, tmp_path / "one", hip_config(basis="activation", **changes))
    update = merge([folder], weights=[0.5])
    save_as_hiplora(update, tmp_path / "out")
    assert_loads_as(update, tmp_path / "out", tiny_model_dir)
    config, original = read_update(tmp_path / "out").config, read_update(folder).config
    for key in ("basis", "basis_sides", "calibration", "base_precision", "fingerprints"):
        assert config[key] == original[key]
    alone, merged = inspect_adapter(folder), inspect_adapter(merge([folder]))
    for one, other in zip(alone["modules"], merged["modules"], strict=True):
        assert other["left"] == pytest.approx(one["left"], rel=1e-4)


def test_an_update_that_is_no_hiplora_adapter_is_refused_and_nothing_written(adapters, tmp_path):
    sides = [
        saved(adapters.base, tmp_path / name, hip_config(target_modules=[name], basis_sides=side))[0]
        for name, side in {"q_proj": "both", "v_proj": "input"}.items()
    ]
    leaking, module = leaky(adapters.base, tmp_path / "leaky")
    for update, why in (
        (merge([adapters["one"], adapters["mlp"]]), r"layers\.0\.mlp\.up_proj: .*save it as plain LoRA"),
        (merge([adapters["one"], adapters["other rank of o"]]), r"o_proj: .*no two channels in one"),
        (merge(sides), r"v_proj: .*protects the sides 'input' there, but 'both' elsewhere"),
        (read_update(leaking), f"{module} leaks"),
    ):
        with pytest.raises(AdapterError, match=why):
            save_as_hiplora(update, tmp_path / "out")
        assert not (tmp_path / "out").exists()
