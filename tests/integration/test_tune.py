"""`hiplora tune` on a tiny model: what it chooses is the best that it measured, and its recipe trains."""

import itertools
import json
import re
import shlex

import pytest
from transformers import JetMoeConfig

from hiplora import trainings as comparison
from hiplora.errors import ConfigError
from hiplora.training import load_recipe, train
from hiplora.tune import TuneSettings, _recipes, _written, summary, tune, within, worst
from tests.calls import watch
from tests.commands import run, succeed
from tests.tiny import write_jsonl

ROWS = [{"prompt": f"{a} plus {b} is ", "completion": str(a + b)} for a in range(6) for b in range(5)]
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 6
DRIFTS = [{"max_drift": limit} for limit in (0.0, float("nan"), float("inf"))]
SIZES = {"rates": (5e-3, 2e-2), "ranks": (2, 4), "steps": 6, "max_length": 64}


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_model_dir):
    folder = tmp_path_factory.mktemp("tune")
    (folder / "drift.txt").write_text(TEXT)
    return str(tiny_model_dir), write_jsonl(folder / "rows.jsonl", ROWS), str(folder / "drift.txt")


@pytest.fixture(scope="module")
def done(job, tmp_path_factory):
    """A finished search with a limit that some points keep and some do not: its results and folder."""
    model, data, text = job
    out = tmp_path_factory.mktemp("done") / "out"
    free = tune(model, data, out, TuneSettings(**SIZES, max_drift=1e6, drift_text=text))
    drifts = sorted(worst(point) for record in free["runs"].values() for point in record["trained"] + record["scaled"])
    limit = drifts[len(drifts) // 2]
    return tune(model, data, out, TuneSettings(**SIZES, max_drift=limit, drift_text=text), overwrite=True), out, limit


def test_the_choice_is_the_lowest_loss_within_the_limit(done):
    results, out, limit = done
    assert list(results["runs"]) == [
        f"lr{rate:g}-r{rank}" for rate, rank in itertools.product(*list(SIZES.values())[:2])
    ]
    points = [(point, key) for key, one in results["runs"].items() for point in one["trained"] + one["scaled"]]
    losses = {point["held_out_loss"]: key for point, key in points if worst(point) <= limit}
    assert results["chosen"] == losses[min(losses)]
    assert min(losses) < results["base"]["held_out_loss"]
    assert min(point["held_out_loss"] for point, _ in points) < min(losses), "the limit had something to keep out"
    recipe, best = load_recipe(out / "recipe.yaml"), results["runs"][results["chosen"]]["best"]
    assert f"lr{recipe.train.lr:g}-r{recipe.method.r}" == results["chosen"]
    assert recipe.train.steps == best.get("step", 6)
    assert json.loads((out / "tune.json").read_text())["chosen"] == results["chosen"]
    assert len(summary(results)) == len(results["runs"])


def test_the_recipe_of_a_mark_inside_a_run_trains_what_was_measured_there(job, tmp_path):
    model, data, text = job
    sizes = {"rates": (5e-3,), "steps": 36, "max_length": 64}  # of which two are the warm-up
    (run,) = tune(model, data, tmp_path / "out", TuneSettings(**sizes, drift_text=text))["runs"].values()
    (recipe,) = _recipes(model, data, TuneSettings(**sizes)).values()
    (tmp_path / "recipe.yaml").write_text(_written(recipe, run["trained"][0], 0.1))
    again = train(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "again")
    assert again.metrics[-1]["step"] == 9
    assert again.held_out["after"] == pytest.approx(run["trained"][0]["held_out_loss"], abs=1e-5)


@pytest.mark.parametrize("where", ["trained", "scaled"])
def test_a_point_over_the_limit_or_worse_than_the_base_is_not_taken(where):
    def point(loss, *kls):
        return {"held_out_loss": loss, "drift": {str(place): {"kl": kl} for place, kl in enumerate(kls)}}

    good, over, worse = point(0.9, 0.1, 0.2), point(0.5, 0.1, 0.3), point(1.1, 0.0, 0.0)
    record = {"trained": [], "scaled": [], where: [over, good, worse]}
    assert within(record, 0.2, base=1.0) is good
    assert within(record, 0.15, base=1.0) is None


def test_the_command_ends_with_what_comes_next_and_that_works(job, tmp_path, capsys):
    model, data, text = job
    command = ["tune", data, "--model", model, "--drift-text", text, "--rates", "2e-2", "--steps", "4"]
    said = succeed(capsys, *command, "--max-drift", "100", "--out", tmp_path / "out")
    last = said.splitlines()[-1].removeprefix("next: hiplora ").partition("   (")[0]
    succeed(capsys, *shlex.split(last))
    assert "allow more drift" in succeed(capsys, *command, "--max-drift", "1e-12", "--out", tmp_path / "none")
    assert not (tmp_path / "none/recipe.yaml").exists()


def test_an_interrupted_search_goes_on_where_it_stopped(job, tmp_path, monkeypatch):
    model, data, text = job
    settings = TuneSettings(**{**SIZES, "ranks": (2,)}, drift_text=text)
    calls = watch(monkeypatch, comparison, "train", 2)
    with pytest.raises(KeyboardInterrupt):
        tune(model, data, tmp_path / "out", settings)
    results = tune(model, data, tmp_path / "out", settings)
    assert [recipe.train.lr for recipe, *_ in calls] == [5e-3, 2e-2, 2e-2]
    assert len(results["runs"]) == 2


@pytest.mark.parametrize("wrong", [{"rates": ()}, {"rates": (-1.0,)}, {"ranks": ()}, *DRIFTS])
def test_settings_that_make_no_sense_are_refused_before_anything_is_written(job, tmp_path, wrong):
    with pytest.raises(ConfigError):
        tune(*job[:2], tmp_path / "out", TuneSettings(**{**SIZES, **wrong}))
    assert not (tmp_path / "out").exists()


def test_a_model_without_the_layers_of_the_method_is_refused_with_a_way_out_that_the_command_has(
    job, tmp_path, capsys
):
    sizes = {"hidden_size": 32, "num_key_value_heads": 2, "kv_channels": 16, "intermediate_size": 48}
    JetMoeConfig(**sizes, num_hidden_layers=1).save_pretrained(tmp_path / "model")  # experts unlike others'
    code, _, err = run(capsys, "tune", job[1], "--model", tmp_path / "model", "--out", tmp_path / "out")
    assert code == 2
    assert re.search("method hiplora: .* recognised in JetMoe.*; take another model", err)
