"""The long frontier's comparison at equal learning."""

import json
import math

import pandas as pd
import pytest
import yaml
from benchmarks.frontier import RECIPE, make_config, runs
from benchmarks.frontier_merges import table
from benchmarks.frontier_report import at_equal_loss, drift_at

from tests.tiny import tiny_llama

METHODS = yaml.safe_load(RECIPE.read_text())["methods"]


def points(*rows: tuple[float, int, float, float, float]) -> pd.DataFrame:
    """Points as (rate, step, scale, held-out loss, drift)."""
    return pd.DataFrame(rows, columns=["rate", "step", "scale", "heldout_loss", "kl/x"])


def records(method: str, seed: int, *rows: tuple[float, float, float, float]) -> pd.DataFrame:
    """A run's records from points of `points` without their rate."""
    wide = points(*((1e-3, *row) for row in rows)).assign(task="t", method=method, seed=seed)
    return wide.melt(["task", "method", "rate", "seed", "step", "scale"], var_name="metric")


def test_drift_at_a_loss_is_interpolated_on_the_log_scale_along_steps_and_along_scales_of_the_end() -> None:
    rows = (1e-3, 20, 1.0, 1.0, 0.01), (1e-3, 40, 1.0, 0.8, 0.04)
    for loss, drift in ((0.9, 0.02), (0.8, 0.04), (0.7, math.nan)):
        assert drift_at(points(*rows), loss, "kl/x") == pytest.approx(drift, nan_ok=True)
    assert drift_at(points(*rows, (1e-3, 40, 0.5, 0.9, 0.005)), 0.9, "kl/x") == pytest.approx(0.005)


def test_methods_are_compared_at_the_loss_that_both_reach() -> None:
    table = pd.concat(
        part
        for seed, factor in ((0, 1.0), (1, 1.1))
        for part in (
            records("hiplora", seed, (20, 1.0, 1.0, 0.001), (40, 1.0, 0.7, 0.004)),
            records("lora", seed, (20, 1.0, 1.0, 0.01 * factor), (40, 1.0, 0.8, 0.04 * factor)),
        )
    )
    (row,) = at_equal_loss(table).to_dict("records")
    assert row["heldout_loss"] == pytest.approx(0.8)
    assert row["kl_hiplora"] == pytest.approx(0.001 * 4 ** (2 / 3))
    assert row["times_as_far"] == pytest.approx(row["kl_rival"] / row["kl_hiplora"])
    assert row["low"] < row["times_as_far"] < row["high"]


def test_runs_come_once_and_seed_by_seed() -> None:
    block = {"name": "one", "tasks": ["t"], "methods": ["a", "b"], "rates": [1], "seeds": [0, 1]}
    names = [run.name for run in runs({"blocks": [block, {**block, "name": "two"}]}, None)]
    assert names == ["t-a-lr1-seed0", "t-b-lr1-seed0", "t-a-lr1-seed1", "t-b-lr1-seed1"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_the_recipe_has_a_configuration(name):
    config = make_config(tiny_llama(), METHODS[name])
    assert config.target_modules
    assert getattr(config, "gradient_projection", True) is (name != "hiplora-retraction")


def test_a_merge_fails_where_a_task_keeps_less_than_the_threshold_of_its_likelihood(tmp_path):
    about = {"rule": "addition", "method": "hiplora", "seeds": {}, "kl": {"t": 0.5}}
    about["alone"] = {"gsm8k": 0.8, "code": 0.6}
    for place, rises in enumerate(((0.01, 0.07), (0.0, 0.12), (0.0, 0.0))):  # kept of code: 93 %, 89 %, all
        losses = {"gsm8k": 0.8 + rises[0], "code": 0.6 + rises[1]}
        (tmp_path / f"merge-{place}.json").write_text(json.dumps(about | {"merged": losses}))
    (row,) = table(tmp_path).to_dict("records")
    assert (row["merges"], row["fail at 0.9"], row["fail at 0.95"]) == (3, 1, 2)
    kept = [(100 * math.exp(-0.8), 0.01), (100 * math.exp(-0.6), 0.07), (100 * math.exp(-0.6), 0.12)]
    drop = sum(alone * (1 - math.exp(-rise)) for alone, rise in kept) / 6
    assert row["mean drop, points"] == pytest.approx(drop, abs=0.006)
