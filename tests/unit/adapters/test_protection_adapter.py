import dataclasses

import pytest
import torch
from peft import LoraConfig

from hiplora.adapters import protect, read_update, remaining
from hiplora.adapters.protection import totals
from hiplora.errors import ConfigError
from tests import reference
from tests.unit.adapters.inputs import Case
from tests.unit.adapters.samples import ATTENTION, product, saved

Q0 = "model.layers.0.self_attn.q_proj"


def bases_of(update, seed=0):
    return {
        module: Case(A.shape[1], 1, 1, 200, seed + i).inputs
        for i, (module, (A, _)) in enumerate(update.factors.items())
    }


@pytest.fixture(scope="session")
def lora(tiny_model_dir, tmp_path_factory):
    config = LoraConfig(r=4, lora_alpha=16, target_modules=ATTENTION, modules_to_save=["lm_head"])
    return saved(tiny_model_dir, tmp_path_factory.mktemp("lora") / "adapter", config)[0]


def dense_reference(update, module, basis, k):
    E = basis.vectors[:, :k]
    return product(update, module).double() @ reference.complement(E)


@pytest.mark.parametrize("name", ["hip", "lora"])
def test_every_module_is_projected_off_its_own_inputs(request, name):
    folder = request.getfixturevalue(name)
    update = read_update(folder if name == "lora" else folder[0])
    bases = bases_of(update)
    after = protect(update, bases, 10)
    assert after.factors.keys() == update.factors.keys()
    for module, basis in bases.items():
        expected = dense_reference(update, module, basis, 10)
        assert (product(update, module) - expected).norm() > 0.1 * expected.norm()
        torch.testing.assert_close(product(after, module).double(), expected, rtol=1e-5, atol=1e-5)


def test_the_result_is_a_plain_update_that_says_what_was_done(hip):
    update = read_update(hip[0])
    after = protect(update, bases_of(update), "energy:0.5", 0.5, "soft")
    assert (after.kind, after.channels, after.base) == ("projected", {}, update.base)
    assert after.config["peft_type"] == "LORA"
    assert set(after.config["target_modules"]) == set(ATTENTION)
    assert "principal_rank" not in after.config
    assert after.fingerprints == update.fingerprints
    assert after.ranks == update.ranks
    assert after.source == (
        f"{hip[0]} projected off its layers' inputs (principal_rank=energy:0.5, projection=soft, strength=0.5)"
    )
    assert update.channels


def test_strength_zero_keeps_every_factor_and_extras_are_kept_whole(lora):
    update = read_update(lora)
    after = protect(update, bases_of(update), 8, 0.0)
    for module, (A, B) in update.factors.items():
        assert torch.equal(after.factors[module][0], A)
        assert torch.equal(after.factors[module][1], B)
    assert after.extras.keys() == {"lm_head.weight"}
    assert after.config["modules_to_save"] == ["lm_head"]


def test_what_remains_is_told_module_by_module_and_in_all(lora):
    update = read_update(lora)
    bases = bases_of(update)
    rows = remaining(update, protect(update, bases, 8), bases, 8)
    assert [row.module for row in rows] == list(update.factors)
    for row in rows:
        before = product(update, row.module)
        after = dense_reference(update, row.module, bases[row.module], 8)
        assert row.norm_share == pytest.approx((after.norm() / before.norm()).item() ** 2, rel=1e-3)
        assert 0 < row.energy_share < row.norm_share < 1  # what is taken is what is fed most
        assert (row.k, row.width) == (8, 64)
    total = totals(rows)
    assert min(r.energy_share for r in rows) < total["energy_share"] < max(r.energy_share for r in rows)
    assert rows[0].as_dict()["norm_share"] == rows[0].norm_share


def test_of_nothing_nothing_remains(lora):
    update = read_update(lora)
    bases = bases_of(update)
    whole, nothing = remaining(update, update, bases), protect(update, bases, 64)
    assert {row.norm_share for row in whole} == {row.energy_share for row in whole} == {1.0}
    assert totals(remaining(update, nothing, bases, 64)) == {"norm_share": 0.0, "energy_share": 0.0}
    assert totals(remaining(nothing, nothing, bases, 64)) == {"norm_share": 0.0, "energy_share": 0.0}


def test_a_layer_with_too_few_directions_is_named(lora):
    update = read_update(lora)
    bases = bases_of(update)
    bases[Q0] = dataclasses.replace(bases[Q0], vectors=bases[Q0].vectors[:, :5])
    with pytest.raises(ConfigError, match=rf"layer {Q0}: principal_rank 6 exceeds the 5 eigenvectors"):
        protect(update, bases, 6)
