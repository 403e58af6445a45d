"""The recipes in examples/ are valid, and say what they are."""

from pathlib import Path

import pytest

from hiplora.training.recipe import TrainRecipe, load_recipe

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_a_sound_recipe_and_says_what_it_is(path):
    assert path.read_text().startswith("# ")
    load_recipe(path)


def test_the_papers_example_differs_from_the_defaults_in_what_it_says():
    made = load_recipe(ROOT / "examples" / "paper.yaml")
    default = TrainRecipe(model=made.model, data=made.data, method={"name": "hiplora", "preset": "paper"})
    assert made.method == default.method
    changed = {k for k, v in made.train if v != getattr(default.train, k)}
    assert changed == {"dtype", "gradient_checkpointing"}
