import pytest
import torch
from peft import LoraConfig

import hiplora
from hiplora.adapters import BaseWeights, allocation_rows, inspect_adapter, read_update
from hiplora.errors import AdapterError, ConfigError
from tests.reference import dense_svd
from tests.tiny import save_tiny
from tests.unit.adapters.samples import ATTENTION, base_model, deltas, hip_config, leaky, saved


def dense_allocation(delta, weight, k):
    """Where the energy of a dense update lies, by full SVD and dense projectors."""
    U, sigma, V = dense_svd(weight, k)
    delta = delta.double()
    energy = delta.norm() ** 2
    left, right = U @ (U.T @ delta), (delta @ V) @ V.T
    both = U @ (U.T @ delta @ V) @ V.T
    return (
        {
            "left": (left.norm() ** 2 / energy).item(),
            "right": (right.norm() ** 2 / energy).item(),
            "both": (both.norm() ** 2 / energy).item(),
            "norm": delta.norm().item(),
        },
        torch.diag(U.T @ delta @ V),
        sigma,
    )


@pytest.mark.parametrize("kind", ["hiplora", "lora", "without gains"])
@pytest.mark.parametrize("rank", [6, 10])
def test_rows_agree_with_dense_projectors_on_the_full_svd(tiny_model_dir, tmp_path, kind, rank):
    config = {
        "hiplora": hip_config(),
        "lora": LoraConfig(r=4, target_modules=ATTENTION),
        "without gains": hip_config(principal_channel=False),
    }[kind]
    folder, model = saved(tiny_model_dir, tmp_path / "a", config)
    record = inspect_adapter(folder, rank=rank)
    assert (record["directions"], record["principal_rank"]) == ("singular", rank)
    weights = base_model(tiny_model_dir).state_dict()
    expected = deltas(model)
    assert [row["module"] for row in record["modules"]] == sorted(expected)
    for row in record["modules"]:
        numbers, gains, sigma = dense_allocation(expected[row["module"]], weights[f"{row['module']}.weight"], rank)
        for key, number in numbers.items():
            assert row[key] == pytest.approx(number, rel=1e-3, abs=1e-6), (row["module"], key)
        assert row["sigma"] == pytest.approx(sigma.tolist(), rel=1e-4)
        assert row["gains"] == pytest.approx(gains.tolist(), rel=1e-2, abs=1e-4)


def test_hiplora_gains_are_its_deltas_and_its_residual_stays_outside(hip):
    folder, _ = hip
    update = read_update(folder)
    for row in allocation_rows(folder):
        channels = update.channels[row["module"]]
        assert row["gains"] == pytest.approx(channels.delta.tolist(), abs=1e-6)
        assert row["left"] == pytest.approx(row["both"], abs=1e-6)
        assert row["right"] == pytest.approx(row["both"], abs=1e-6)
        assert row["leak"] < 1e-5


def test_the_protected_directions_are_the_default_of_any_basis_with_chance_beside_them(tiny_model_dir, tmp_path):
    config = hip_config(basis="activation", principal_channel=False)
    rows = torch.randint(0, 256, (6, 40), generator=torch.Generator().manual_seed(0))
    hiplora.calibrate(base_model(tiny_model_dir), config, rows=rows)
    folder, _ = saved(tiny_model_dir, tmp_path / "a", config)
    record = inspect_adapter(folder)
    assert record["directions"] == "protected"
    for row in record["modules"]:
        assert row["left"] + row["right"] < 1e-6
        m, n = read_update(folder).shape(row["module"])
        assert row["chance"] == pytest.approx(6 / m + 6 / n - 36 / (m * n))
    singular = inspect_adapter(folder, rank=6)
    assert singular["directions"] == "singular"
    assert singular["summary"]["left"] > 0.01


def test_the_own_rank_is_the_default_and_needs_no_base_model(hip, monkeypatch):
    monkeypatch.setattr(BaseWeights, "__init__", lambda *_: pytest.fail("the base model was opened"))
    record = inspect_adapter(hip[0])
    assert record["principal_rank"] == 6
    assert {row["rank"] for row in record["modules"]} == {6}


def test_a_lora_adapter_is_looked_at_with_32_directions_or_as_many_as_there_are(tiny_model_dir, tmp_path):
    folder, _ = saved(tiny_model_dir, tmp_path / "a", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    record = inspect_adapter(folder)
    assert record["principal_rank"] == 32
    assert {row["type"]: row["leak"] for row in record["modules"]} == {"q_proj": None, "v_proj": None}
    for row in inspect_adapter(folder, rank=48)["modules"]:
        assert row["rank"] == (48 if row["type"] == "q_proj" else 32)
        if row["type"] == "v_proj":  # all 32 output directions of a 32 × 64 weight
            assert row["left"] == pytest.approx(1.0, abs=1e-6)


def test_a_leak_is_shown_rather_than_refused_where_a_complement_is_promised(tiny_model_dir, tmp_path):
    folder, module = leaky(tiny_model_dir, tmp_path / "a")
    record = inspect_adapter(folder)
    row = next(row for row in record["modules"] if row["module"] == module)
    assert row["leak"] > 0.1
    assert record["summary"]["max_leak"] == row["leak"]
    folder, _ = saved(tiny_model_dir, tmp_path / "free", hip_config(residual_projection=False))
    assert {row["leak"] for row in allocation_rows(folder)} == {None}


def test_another_base_model_and_a_rank_below_one_are_refused(hip, tmp_path):
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(AdapterError, match="not the one that this adapter was made for"):
        inspect_adapter(hip[0], base=str(other), rank=8)
    with pytest.raises(ConfigError, match="rank is 0"):
        inspect_adapter(hip[0], rank=0)
