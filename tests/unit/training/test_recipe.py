"""The recipe: defaults, checks, everything wrong at once with the way out, and dumps that keep the keys of jobs."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from hiplora.data.examples import DataSettings
from hiplora.errors import ConfigError
from hiplora.training.baselines import METHODS
from hiplora.training.reading import load_recipe
from hiplora.training.recipe import TrainRecipe, TrainSettings
from tests.tiny import write_jsonl

EXAMPLES = sorted((Path(__file__).resolve().parents[3] / "examples").glob("*.yaml"))
BLOCKS = [TrainRecipe, DataSettings, TrainSettings, *METHODS.values()]
GOOD = "model: some/model\ndata: rows.jsonl\n"


def recipe(**blocks):
    return TrainRecipe.model_validate({"model": "some/model", "data": "rows.jsonl", **blocks})


def problems(**blocks):
    with pytest.raises(ValidationError) as caught:
        recipe(**blocks)
    return [(error["loc"], error["type"]) for error in caught.value.errors()]


@pytest.fixture
def folder(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "a", "output": "b"}] * 3)
    return tmp_path


def write(folder, text):
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return folder / "recipe.yaml"


def complaints(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize("block", BLOCKS)
def test_every_field_is_documented(block):
    assert [name for name, field in block.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("given", "read"),
    [("tatsu-lab/alpaca", ("tatsu-lab/alpaca", None)), ("a/b:de", ("a/b", "de")), ("sub/rows.jsonl", (None, None))],
)
def test_data_that_reads_owner_and_name_is_a_data_set_on_the_hub(given, read):
    data = recipe(data=given).data
    assert (data.hub, data.hub_config) == read
    assert data.path == (None if read[0] else given)


def test_a_users_defaults_are_three_epochs_those_of_studies_and_the_papers_preset_the_papers(folder):
    def size(train):
        return train.steps, train.epochs, train.batch_size * train.gradient_accumulation, train.max_length

    study = recipe()
    assert (study.method.name, study.method.preset, study.method.basis) == ("hiplora", "function-aware", "activation")
    assert size(study.train) == (2000, None, 128, 2048)
    mine, paper = (load_recipe(write(folder, GOOD + end)) for end in ("", "method: {preset: paper}\n"))
    assert (size(mine.train), mine.data.template) == ((None, 3.0, 16, 1024), "auto")
    assert (size(paper.train), paper.data.template) == (size(study.train), None)
    assert size(load_recipe(write(folder, GOOD + "train: {steps: 7, batch_size: 1}\n")).train) == (7, None, 4, 1024)
    assert load_recipe(write(folder, json.dumps(mine.values()))) == mine


def test_keys_of_jobs_are_made_of_what_differs_from_the_defaults():
    """A study's job is named by the hash of this dump: a new default or field name would lose its records."""
    asked = recipe(
        data={"path": "a.jsonl", "held_out_fraction": 0.1, "template": "direct"},
        method={"name": "hiplora", "preset": "paper", "principal_rank": 8, "stability_weight": 0.5},
        train={"epochs": 2.0, "lr": 1e-3, "packing": False, "kl_weight": 0.1},
        seed=7,
    )
    assert json.loads(json.dumps(asked.model_dump(mode="json", exclude_defaults=True))) == {
        "model": "some/model",
        "data": {"path": "a.jsonl", "held_out_fraction": 0.1, "template": "direct"},
        "method": {"preset": "paper", "principal_rank": 8, "stability_weight": 0.5}
        | {"basis": "weight", "principal_channel": True, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        "train": {"steps": None, "epochs": 2.0, "lr": 1e-3, "packing": False, "kl_weight": 0.1},
        "seed": 7,
    }
    for name in METHODS:
        dumped = recipe(method=name).model_dump(exclude_defaults=True, exclude={"model", "data"})
        assert dumped == ({} if name == "hiplora" else {"method": {}})


def test_values_are_not_coerced_and_must_be_finite():
    wrong = problems(train={"steps": "10", "batch_size": True, "lr": float("nan"), "packing": 1}, seed=1.5)
    assert {loc[-1] for loc, _ in wrong} == {"steps", "batch_size", "lr", "packing", "seed"}


@pytest.mark.parametrize(
    "blocks",
    [
        {"data": {}},
        {"data": {"path": "a.jsonl", "hub": "b"}},
        {"data": {"path": "a.jsonl", "split": "train"}},
        {"data": {"path": "a.jsonl", "held_out": "b.jsonl", "held_out_fraction": 0.1}},
        {"data": {"path": "a.jsonl", "held_out_limit": 3}},
        {"data": {"path": "a.jsonl", "format": "text", "template": "chat"}},
        {"train": {"epochs": 2.0, "steps": 10}},
        {"train": {"eval_every": 5}},
        {"train": {"kl_tokens": 7}},
        {"train": {"kl_weight": 0.1}, "method": "pissa"},
        {"train": {"masked_kl_weight": 0.1}, "method": "milora"},
        {"train": {"max_drift": 0.1}},
        {"method": {"name": "proj_lora", "projection": "soft", "basis": "weight"}},
        {"method": {"name": "hiplora", "residual_projection": False}},
        {"method": {"name": "split_lora", "clients": 3}, "train": {"gradient_accumulation": 4}},
        {"method": {"name": "adalora", "tinit": 5}, "train": {"steps": 6}},
        {"method": {"name": "adalora", "r": 8, "init_r": 8}},
        {"method": "adalora", "train": {"start_from": "runs/first"}},
    ],
)
def test_contradictions_are_refused(blocks):
    assert {kind for _, kind in problems(**blocks)} == {"value_error"}


@pytest.mark.parametrize("rank", [0, 1.0, "energy:1", "energy:0.0", "32", "all"])
def test_a_principal_rank_is_a_number_a_fraction_or_a_share_of_energy(rank):
    assert problems(method={"name": "hiplora", "principal_rank": rank})
    assert recipe(method={"principal_rank": "energy:.9"}).method.principal_rank == "energy:.9"


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_written_out_reads_back_the_same(name):
    loaded = recipe(method=name, train={"epochs": 1.5}, data={"path": "a.jsonl", "held_out_fraction": 0.5})
    assert TrainRecipe.model_validate(loaded.values()) == loaded


def test_the_examples_are_recipes():
    assert [load_recipe(path).model for path in EXAMPLES]


def test_paths_are_relative_to_the_recipe(folder, monkeypatch):
    path = write(folder, GOOD + "method: lora\nout: run\ntrain: {lr: 1e-3, steps: 7}\n")
    monkeypatch.chdir("/")
    loaded = load_recipe(path)
    assert (loaded.data.path, loaded.out) == (str(folder / "rows.jsonl"), str(folder / "run"))
    assert (loaded.model, loaded.method.name, loaded.train.lr, loaded.train.steps) == ("some/model", "lora", 1e-3, 7)


def test_everything_wrong_is_listed_at_once(folder):
    wrong = {"model": "./nowhere", "data": {"path": "rows.jsonl", "fromat": "alpaca"}, "lr": 1e-4, "lora_r": 4}
    wrong |= {"sede": 3, "method": {"name": "lora", "principal_rank": 3}}
    wrong |= {"train": {"lr": "fast", "stepz": 4, "learning_rate": 1.0, "dtype": "fp8"}}
    path = write(folder, json.dumps(wrong))
    message = complaints(path)
    assert message.startswith(f"{path}: 10 problems\n")
    for said in (
        "model: no such folder",
        "data.fromat: unknown field; did you mean `format`?",
        "method.principal_rank: not a field of this method but of hiplora, proj_lora",
        "train.lr: should be a valid number, found 'fast'",
        "train.stepz: unknown field; did you mean `steps`?",
        "train.learning_rate: unknown field; did you mean `train.lr`?",
        "lora_r: unknown field; did you mean `method.r`?",
        "'auto', 'fp32', 'bf16' or 'fp16', found 'fp8'",
        "sede: unknown field; did you mean `seed`?",
        "lr: unknown field; did you mean `train.lr`?",
    ):
        assert said in message
    message = complaints(write(folder, "data: rows.jsonl\nmethod: hiplroa\n"))
    for said in ("model: is missing; add `model:`", "unknown method 'hiplroa'", "did you mean `hiplora`?"):
        assert said in message


@pytest.mark.parametrize("field", ["path", "held_out"])
def test_rows_are_checked_to_the_last(folder, field):
    bad = write_jsonl(folder / "bad.jsonl", [{"instruction": "a", "output": "b"}, {"instruction": "a"}])
    path = write(folder, json.dumps({"model": "x/y", "data": {"path": "rows.jsonl", field: "bad.jsonl"}}))
    assert f"data.{field}: {bad}, line 2: output: Field required" in complaints(path)


def test_what_is_not_a_recipe_is_refused(folder):
    assert "not valid YAML" in complaints(write(folder, "model: [a\nb: c\n"))
    assert "not valid YAML" in complaints(write(folder, "model: !!python/name:os.system x\n"))
    assert "expected a mapping" in complaints(write(folder, "- a\n- b\n"))
    assert "model: is missing" in complaints(write(folder, ""))


def test_overrides_win_are_read_as_yaml_and_relative_to_the_current_folder(folder, monkeypatch):
    path = write(folder, GOOD + "method: hiplora\ntrain: {lr: 1e-3, steps: 9}\n")
    loaded = load_recipe(path, ["train.lr=2e-5", "method.principal_rank=4", "train.packing=false", "data.limit=2"])
    assert (loaded.train.lr, loaded.train.packing, loaded.train.steps) == (2e-5, False, 9)
    assert (loaded.method.principal_rank, loaded.data.limit) == (4, 2)
    assert load_recipe(path, ["method=lora", "train.steps=", "train.epochs=1"]).train.epochs == 1
    (folder / "elsewhere").mkdir()
    mine = write_jsonl(folder / "elsewhere" / "mine.jsonl", [{"text": "a"}])
    monkeypatch.chdir(folder / "elsewhere")
    assert load_recipe(path, ["data.path=mine.jsonl"]).data.path == str(mine)
    loaded = load_recipe(path, ["data=mine.jsonl", "data.limit=1", "data.mix={mine.jsonl: 0.5}"])
    assert (loaded.data.path, loaded.data.limit, loaded.data.mix) == (str(mine), 1, {str(mine): 0.5})
    assert "expected key=value" in complaints(path, "train.lr")
    assert "is not a block" in complaints(path, "seed=3", "seed.x=4")


def test_an_adapter_to_start_from_must_be_of_the_same_method(folder):
    path = write(folder, GOOD + "method: {name: lora, r: 4}\ntrain: {start_from: first}\n")
    start = folder / "first"
    start.mkdir()
    assert "first has no adapter_config.json" in complaints(path)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (start / name).touch()
    for method, said in (
        ("name: lora, r: 8", "holds another adapter (method.r: 8 there, 4 here)"),
        ("name: osf", "method osf there, lora here"),
        ("name: lora, r: 4, rankk: 2", "is not a recipe of this version"),
    ):
        write(start, f"method: {{{method}}}\n")
        assert said in complaints(path)
    write(start, "method: {name: lora, r: 4, lora_dropout: 0.0}\n")
    assert load_recipe(path).train.start_from == str(start)


def test_checking_a_recipe_loads_no_heavy_library(folder):
    heavy = "{'torch', 'transformers', 'peft', 'datasets'}"
    script = f"load_recipe({str(write(folder, GOOD))!r}); print({heavy} & sys.modules.keys())"
    command = [sys.executable, "-c", f"import sys; from hiplora.training import load_recipe; {script}"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "set()"


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_field_of_another_method_or_of_another_type_is_a_problem_of_the_recipe_never_an_error_of_its_checks(method):
    for field in sorted({field for kind in METHODS.values() for field in kind.model_fields} - {"name"}):
        for value in (True, 0.5, 2, "x", None, [], {}):
            with contextlib.suppress(ValidationError):
                recipe(method={"name": method, field: value})
