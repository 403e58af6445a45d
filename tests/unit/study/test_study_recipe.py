"""A study's recipe: what it may hold, what it extends, and how a mistake is reported."""

import re

import pytest

from hiplora.errors import ConfigError
from hiplora.study.recipe import load_study, own_studies

SMALL = """\
study: small
model: pico
domains:
  sums: {title: Sums, train: {path: gsm8k_train.jsonl, held_out_fraction: 0.1}, tasks: {gsm8k: 4}}
methods:
  lora: {title: LoRA, method: lora}
protocols:
  single_task: {methods: [lora]}
"""
SINGLE = "single_task: {methods: [lora]}"


def write(folder, text=SMALL, name="small.yaml"):
    path = folder / name
    path.write_text(text)
    return path


def test_a_method_may_have_its_own_training(tmp_path):
    recipe = load_study(write(tmp_path), ["methods.lora.train={batch_size: 2, epochs: 1.5}"])
    row = recipe.methods["lora"]
    settings = recipe.training(row)
    assert (settings.batch_size, settings.epochs, settings.steps) == (2, 1.5, None)
    stopped = recipe.training(row, steps=3)
    assert (stopped.steps, stopped.epochs) == (3, None)
    assert recipe.given_rate(row) == 2e-4


def test_a_recipe_extends_another(tmp_path):
    write(tmp_path)
    child = write(
        tmp_path,
        "extends: small.yaml\nstudy: child\nseeds: [7]\n"
        "methods:\n  pissa: {title: PiSSA, method: pissa}\n"
        "protocols:\n  single_task: null\n  adalora: {methods: [pissa, lora]}\n",
        "child.yaml",
    )
    recipe = load_study(child, ["domains.sums.title=Totals"])
    assert (recipe.domains["sums"].title, recipe.domains["sums"].task) == ("Totals", "gsm8k")
    assert (recipe.study, recipe.model, recipe.seeds) == ("child", "pico", [7])
    assert list(recipe.methods) == ["lora", "pissa"]
    assert recipe.protocols.single_task is None
    assert recipe.protocols.adalora.methods == ["pissa", "lora"]


@pytest.mark.parametrize(
    ("recipe", "changes", "place"),
    [
        ("parent/small.yaml", (), "parent/base"),
        ("child.yaml", (), "parent/base"),
        ("child.yaml", ("model=./own",), "here/own"),
        ("pico", ("model=../own",), "own"),
    ],
)
def test_a_models_path_is_relative_to_the_file_that_names_it_or_to_the_current_folder(
    tmp_path, monkeypatch, recipe, changes, place
):
    for folder in ("parent", "here"):
        (tmp_path / folder).mkdir()
    write(tmp_path / "parent", SMALL.replace("pico", "./base"))
    write(tmp_path, "extends: parent/small.yaml\nstudy: child\n", "child.yaml")
    monkeypatch.chdir(tmp_path / "here")
    recipe = recipe if recipe == "pico" else f"../{recipe}"
    assert load_study(recipe, changes).model == str(tmp_path / place)


def test_a_circle_of_recipes_is_refused(tmp_path):
    write(tmp_path, "extends: b.yaml\nstudy: a\n", "a.yaml")
    write(tmp_path, "extends: a.yaml\nstudy: b\n", "b.yaml")
    with pytest.raises(ConfigError, match=r"extends a\.yaml, which extends this recipe"):
        load_study(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("model: pico", "model: pico\nwarmth: 3", "warmth: unknown field"),
        ("model: pico", "model: pico\nseed: [1]", "seed: unknown field; did you mean `seeds`?"),
        ("{gsm8k: 4}", "{gsm8k: 4}, task: {}", "domains.sums.task: unknown field; did you mean `tasks`?"),
        ("method: lora", "method: {name: lora, lora_alfa: 3}", "methods.lora.method.lora_alfa"),
        ("model: pico\n", "", "model: is missing; add `model:`"),
        ("{gsm8k: 4}", "{gsm8k: 0}", "domains.sums.tasks.gsm8k: should be greater than or equal to 1"),
        (", held_out_fraction: 0.1", "", "add `held_out_fraction: 0.05`"),
        ("method: lora", "method: lora, train: {step: 2}", "`methods.lora.train`: step"),
        ("model: pico", "model: pico\nrates: {grid: [0.1], seed: 42}", "`rates.seed` 42 is one of the study's seeds"),
        (SINGLE, "single_task: {methods: [lora], seeds: [7]}\nrates: {grid: [1]}", "one of `protocols.single_task`'s"),
        ("model: pico", "model: pico\nrates: {grid: [0.1], domains: [code]}", "`rates.domains` names 'code'"),
        ("model: pico", "model: pico\nseeds: [1, 1]", "`seeds`"),
        ("methods: [lora]", "methods: [lara]", "`protocols.single_task.methods` names 'lara'; expected one of lora"),
        ("methods:\n", "methods:\n  other: {title: LoRA, method: lora}\n", "`methods`: two have the title 'LoRA'"),
        (SINGLE, "rank_one: {bases: [weight, weight]}", "`bases` lists a value twice"),
        (SINGLE, "ablations: {method: lora}", "`protocols.ablations.method` is 'lora', which has no gains"),
        (SINGLE, "merge_fail: {methods: [lora], sizes: [2]}", "has 2, and there are 1 domains"),
        (SINGLE, "continual: {methods: [lora]}", "`protocols.continual` needs two or more domains"),
        (SINGLE, "continual: {methods: [lora], orders: [[sums, sums]]}", "protocols.continual"),
        (SINGLE, "editing: {methods: [lora], lr: {hip: 0.1}}", "`protocols.editing.lr` names 'hip'"),
        (SINGLE, "editing: {methods: [lora], sets: {Edit Set: {}}}", "Edit Set"),
        (
            f"lora: {{title: LoRA, method: lora}}\nprotocols:\n  {SINGLE}",
            "alphaedit: {title: A, method: lora}\nprotocols:\n  editing: {methods: [alphaedit]}",
            "'alphaedit' is an editor of weights; rename the method",
        ),
        (SINGLE, "continual: {methods: [lora], order: [sums]}", "order: unknown field; did you mean `orders`?"),
        (
            SINGLE,
            "frontier: {domains: {sums: [lora]}, rates: [0.1, 0.2], plain: [lora], reference: lora}",
            "`protocols.frontier` compares drifts; set `evaluation.drift`",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_reported_with_its_place(tmp_path, old, new, said):
    assert old in SMALL
    with pytest.raises(ConfigError) as error:
        load_study(write(tmp_path, SMALL.replace(old, new)))
    assert said in str(error.value)


def test_texts_of_the_hub_need_a_number_of_rows(tmp_path):
    drift = "evaluation.drift={texts: {wiki: owner/name:text}, window: 32%s}"
    with pytest.raises(ConfigError, match=r"texts\.wiki.*documents: 100"):
        load_study(write(tmp_path), [drift % ""])
    settings = load_study(write(tmp_path), [drift % ", documents: 3"]).evaluation.drift.settings()
    assert settings == {"texts": {"wiki": "owner/name:text"}, "tokens": 512, "window": 32, "documents": 3}


def test_an_unknown_recipe_is_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match=re.escape(", ".join(own_studies()))):
        load_study("nothing")


@pytest.mark.parametrize("name", own_studies())
def test_own_studies_are_valid(name):
    assert load_study(name).study == name
