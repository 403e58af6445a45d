"""The recipe's documentation is what the code does, and the examples are recipes."""

import re
from pathlib import Path

import pytest
import yaml

from hiplora.data.examples import load_examples
from hiplora.data.prompts import instruction_prompt
from hiplora.errors import ConfigError
from hiplora.training.recipe import TrainRecipe, load_recipe
from tests.tiny import write_jsonl

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
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


def test_the_smallest_recipe_of_the_page_is_a_recipe():
    block = re.search(r"## A recipe\n\n```yaml\n(.*?)```", PAGE, re.DOTALL).group(1)
    assert TrainRecipe.model_validate(yaml.safe_load(block)).method.name == "hiplora"


def test_the_wording_on_the_page_is_the_codes():
    assert instruction_prompt("Give the fare.", "One adult, one bicycle") in PAGE


def test_the_rows_on_the_page_have_the_shapes_it_says(tmp_path):
    rows = re.findall(r"^\| `(\w+)` \| `(\{.*?\})`[^|]*\|", PAGE, re.MULTILINE)
    assert [shape for shape, _ in rows] == [
        "alpaca",
        "prompt_completion",
        "question_answer",
        "multiple_choice",
        "messages",
        "text",
    ]
    for shape, text in rows:
        row = yaml.safe_load(
            text.replace("[…]", "[x, y]")
            .replace(", …]", ', {"role": "assistant", "content": …}]')
            .replace("…", '"x"')
        )
        load_examples(write_jsonl(tmp_path / f"{shape}.jsonl", [row]), shape)


def test_the_error_on_the_page_is_the_one_that_the_code_gives(tmp_path, monkeypatch):
    shown = re.search(r"```\nerror: (recipe\.yaml: 3 problems\n.*?)```", PAGE, re.DOTALL).group(1)
    good = {"instruction": "a", "output": "b"}
    write_jsonl(tmp_path / "rows.jsonl", [good] * 6 + [{"instruction": "a"}])
    (tmp_path / "recipe.yaml").write_text(
        "model: smollm2-135m\ndata: rows.jsonl\nmethod:\n  name: lora\n  principal_rank: 8\n"
        "train:\n  lr: 1e-3\n  stepz: 100\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_recipe("recipe.yaml")
    assert str(caught.value).replace(f"{tmp_path}/", "") == shown.strip()
