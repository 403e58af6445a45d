import pytest
import torch

from hiplora.adapters import BaseWeights, allocation_rows, inspect_adapter, read_update
from hiplora.errors import AdapterError, ConfigError
from tests import reference
from tests.tiny import save_tiny
from tests.unit.adapters.samples import base_model, deltas, hip_config, leaky, saved


@pytest.mark.parametrize("name", ["one", "lora", "proj"])
@pytest.mark.parametrize("rank", [6, 10])
def test_rows_agree_with_dense_projectors_on_the_full_svd(adapters, name, rank):
    record = inspect_adapter(adapters[name], rank=rank)
    assert (record["directions"], record["principal_rank"]) == ("singular", rank)
    weights, expected = base_model(adapters.base).state_dict(), deltas(adapters.models[name])
    assert [row["module"] for row in record["modules"]] == sorted(expected)
    for row in record["modules"]:
        delta = expected[row["module"]].double()
        U, sigma, V = reference.dense_svd(weights[f"{row['module']}.weight"], rank)
        shares = reference.energy_fractions(delta, U, V)
        shown = [row[key] for key in ("left", "right", "both", "norm")]
        assert shown == pytest.approx([*shares, delta.norm().item()], rel=1e-3, abs=1e-6)
        assert row["sigma"] == pytest.approx(sigma.tolist(), rel=1e-4)
        assert row["gains"] == pytest.approx(torch.diag(U.T @ delta @ V).tolist(), rel=1e-2, abs=1e-4)


def test_own_directions_are_the_default_need_no_base_and_hold_the_gains_alone(adapters, monkeypatch):
    monkeypatch.setattr(BaseWeights, "__init__", lambda *_: pytest.fail("the base model was opened"))
    record = inspect_adapter(adapters["one"])
    assert record["principal_rank"] == 6
    channels = read_update(adapters["one"]).channels
    for row in record["modules"]:
        assert row["rank"] == 6
        assert row["gains"] == pytest.approx(channels[row["module"]].delta.tolist(), abs=1e-6)
        assert (row["left"], row["right"]) == pytest.approx((row["both"], row["both"]), abs=1e-6)
        assert row["leak"] < 1e-5


def test_the_protected_directions_of_an_activation_basis_come_with_chance_beside_them(tiny_model_dir, tmp_path):
    folder, _ = saved(tiny_model_dir, tmp_path / "a", hip_config(basis="activation", principal_channel=False))
    record = inspect_adapter(folder)
    assert record["directions"] == "protected"
    for row in record["modules"]:
        assert row["left"] + row["right"] < 1e-6
        m, n = read_update(folder).shape(row["module"])
        assert row["chance"] == pytest.approx(6 / m + 6 / n - 36 / (m * n))
    singular = inspect_adapter(folder, rank=6)
    assert singular["directions"] == "singular"
    assert singular["summary"]["left"] > 0.01


def test_a_lora_adapter_is_looked_at_with_32_directions_or_as_many_as_there_are(adapters):
    assert inspect_adapter(adapters["lora"])["principal_rank"] == 32
    for row in inspect_adapter(adapters["lora"], rank=48)["modules"]:
        assert (row["rank"], row["leak"]) == (48 if row["type"] in ("q_proj", "o_proj") else 32, None)
        if row["type"] == "v_proj":  # all 32 output directions of a 32 × 64 weight
            assert row["left"] == pytest.approx(1.0, abs=1e-6)


def test_a_leak_is_shown_rather_than_refused_where_a_complement_is_promised(adapters, tmp_path):
    folder, module = leaky(adapters.base, tmp_path / "a")
    record = inspect_adapter(folder)
    leaks = {row["module"]: row["leak"] for row in record["modules"]}
    assert record["summary"]["max_leak"] == leaks[module] > 0.1
    assert {row["leak"] for row in allocation_rows(adapters["free"])} == {None}


def test_another_base_model_and_a_rank_below_one_are_refused(adapters, tmp_path):
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(AdapterError, match="not the one that this adapter was made for"):
        inspect_adapter(adapters["one"], base=str(other), rank=8)
    with pytest.raises(ConfigError, match="rank is 0"):
        inspect_adapter(adapters["one"], rank=0)
