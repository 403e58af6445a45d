"""Reading a recipe: everything wrong is found at once, with its line and what to do; nothing else is loaded."""

import subprocess
import sys
import textwrap

import pytest

from hiplora.errors import ConfigError
from hiplora.training.recipe import load_recipe
from tests.tiny import write_jsonl


@pytest.fixture
def folder(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "a", "output": "b"}] * 3)
    return tmp_path


def write(folder, text, name="recipe.yaml"):
    path = folder / name
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


def complaints(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


GOOD = "model: some/model\ndata: rows.jsonl\n"


def test_a_sound_recipe_is_read_with_its_paths_beside_it(folder, monkeypatch):
    path = write(folder, GOOD + "method: lora\nout: run\ntrain: {lr: 1e-3, steps: 7}\n")
    monkeypatch.chdir("/")
    recipe = load_recipe(path)
    assert recipe.data.path == str(folder / "rows.jsonl")
    assert recipe.out == str(folder / "run")
    assert (recipe.method.name, recipe.train.lr, recipe.train.steps) == ("lora", 1e-3, 7)


def test_everything_wrong_is_listed_at_once_in_the_files_order(folder):
    path = write(
        folder,
        """\
        model: ./nowhere
        data:
          path: rows.json
          fromat: alpaca
        method: {name: lora, principal_rank: 3}
        train:
          lr: fast
          stepz: 4
          dtype: fp8
        sede: 3
        """,
    )
    message = complaints(path)
    lines = message.splitlines()
    assert lines[0] == f"{path}: 8 problems"
    places = [line.split(": ")[0].strip() for line in lines[1:]]
    assert places == [f"{path}, line {number}" for number in (1, 3, 4, 5, 7, 8, 9, 10)]
    assert "line 1: model: no such folder" in message
    assert "no such file" in lines[2]
    assert "did you mean `format`?" in lines[3]
    assert "it belongs to hiplora, proj_lora" in lines[4]
    assert "should be a valid number, found 'fast'" in lines[5]
    assert "did you mean `steps`?" in lines[6]
    assert "'auto', 'fp32', 'bf16' or 'fp16', found 'fp8'" in lines[7]
    assert "did you mean `seed`?" in lines[8]


def test_a_missing_field_and_an_unknown_method_say_what_to_write(folder):
    message = complaints(write(folder, "data: rows.jsonl\nmethod: hiplroa\n"))
    assert "model: is missing; add `model:`" in message
    assert "unknown method 'hiplroa'" in message
    assert "did you mean `hiplora`?" in message


def test_a_field_in_the_wrong_block_is_shown_the_right_one(folder):
    message = complaints(write(folder, GOOD + "lr: 1e-4\ntrain: {principal_rank: 4}\n"))
    assert "lr: unknown field; did you mean `train.lr`?" in message
    assert "train.principal_rank: unknown field; did you mean `method.principal_rank`?" in message


def test_rows_are_checked_although_the_rest_of_the_recipe_is_wrong(folder):
    write_jsonl(folder / "rows.jsonl", [{"instruction": "a", "output": "b"}, {"instruction": "a"}])
    message = complaints(write(folder, "model: x/y\ndata: {path: rows.jsonl, lmit: 3}\nsede: 3\n"))
    assert f"{folder / 'rows.jsonl'}, line 2: field `output` is missing" in message
    assert "3 problems" in message


def test_a_held_out_file_is_checked_like_the_data(folder):
    path = write(folder, "model: x/y\ndata:\n  path: rows.jsonl\n  held_out: gone.jsonl\n")
    assert "line 4: data.held_out:" in complaints(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: [a\nb: c\n", "line 2, column 2: not valid YAML"),
        ("- a\n- b\n", "expected a mapping"),
        ("model: a\n\tdata: b\n", "line 2"),
        ("model: !!python/name:os.system x\n", "not valid YAML"),
    ],
)
def test_what_is_not_yaml_is_said_with_its_line(folder, text, said):
    assert said in complaints(write(folder, text))


def test_an_empty_recipe_and_a_missing_one_are_errors(folder):
    assert "model: is missing" in complaints(write(folder, ""))
    assert "no such file" in complaints(folder / "none.yaml")


def test_a_key_that_stands_twice_is_an_error(folder):
    path = write(folder, GOOD + "train:\n  lr: 1e-3\n  lr: 1e-4\n")
    assert "line 5: `lr` stands here and in line 4" in complaints(path)


def test_overrides_win_and_are_read_as_yaml(folder):
    path = write(folder, GOOD + "method: hiplora\ntrain: {lr: 1e-3, steps: 9}\n")
    recipe = load_recipe(
        path, ["train.lr=2e-5", "method.principal_rank=4", "train.packing=false", "data.limit=2", "seed=7"]
    )
    assert (recipe.train.lr, recipe.train.packing, recipe.train.steps) == (2e-5, False, 9)
    assert (recipe.method.principal_rank, recipe.data.limit, recipe.seed) == (4, 2, 7)


def test_an_override_can_name_another_method_or_empty_a_field(folder):
    path = write(folder, GOOD + "method: {name: hiplora, r: 4}\ntrain: {steps: 9}\n")
    assert load_recipe(path, ["method=lora"]).method.r == 16
    assert load_recipe(path, ["method.name=lora"]).method.r == 4
    assert load_recipe(path, ["train.steps=", "train.epochs=1"]).train.epochs == 1


def test_an_override_is_relative_to_the_current_folder(folder, monkeypatch):
    path = write(folder, GOOD)
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    write_jsonl(elsewhere / "mine.jsonl", [{"text": "a"}])
    monkeypatch.chdir(elsewhere)
    assert load_recipe(path, ["data.path=mine.jsonl"]).data.path == str(elsewhere / "mine.jsonl")


def test_a_wrong_override_is_named_by_what_was_typed(folder):
    path = write(folder, GOOD)
    message = complaints(path, "train.lr=fast", "train.stepz=3")
    assert "--set train.lr=fast: train.lr: should be a valid number" in message
    assert "--set train.stepz=3: train.stepz: unknown field; did you mean `steps`?" in message
    assert "expected key=value" in complaints(path, "train.lr")
    assert "is not a block" in complaints(path, "seed=3", "seed.x=4")


def test_a_model_folder_must_hold_a_model(folder):
    (folder / "model").mkdir()
    assert "has no config.json" in complaints(write(folder, "model: ./model\ndata: rows.jsonl\n"))
    (folder / "model" / "config.json").write_text("{}")
    recipe = load_recipe(write(folder, "model: ./model\ndata: rows.jsonl\n"))
    assert recipe.model == str(folder / "model")


def test_a_hub_name_is_left_alone(folder):
    assert load_recipe(write(folder, GOOD)).model == "some/model"


def test_checking_a_recipe_loads_no_heavy_library(folder):
    path = write(folder, GOOD)
    script = (
        "import sys\nfrom hiplora.recipes import load_recipe\n"
        f"load_recipe({str(path)!r})\n"
        "print([name for name in ('torch', 'transformers', 'peft', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_adapter_to_start_from_is_looked_for_beside_the_recipe(folder, monkeypatch):
    path = write(folder, GOOD + "method: {name: lora, r: 4}\ntrain:\n  start_from: first\n")
    monkeypatch.chdir("/")
    given = folder / "first"
    assert f"line 5: train.start_from: no such folder: {given}" in complaints(path)
    given.mkdir()
    assert "first has no adapter_config.json" in complaints(path)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (given / name).touch()
    write(given, "method: {name: lora, r: 8}\n")
    assert "line 5: train.start_from: " in complaints(path)
    assert "holds another adapter (method.r: 8 there, 4 here)" in complaints(path)
    write(given, "method: {name: lora, r: 4, rankk: 2}\n")
    assert "is no recipe of this version's" in complaints(path)
    write(given, "method: {name: lora, r: 4, lora_dropout: 0.0}\n")
    assert load_recipe(path).train.start_from == str(given)
    monkeypatch.chdir(folder)
    assert load_recipe(path, ["train.start_from=first"]).train.start_from == str(given)
