"""The smallest study's inputs together: `pico` is scored on every task of the paper and trained on every domain."""

import json

import pytest

from hiplora.cli import main as frame
from hiplora.data.encoding import encode_examples
from hiplora.data.examples import load_examples
from hiplora.evaluation.engine import Engine
from hiplora.evaluation.suite import read_suite
from hiplora.models import load
from hiplora.study.pico_data import TEST_ROWS, write_pico_data

LENGTH = 128
TRAINING = ("alpaca", "gsm8k_train", "codealpaca")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pico")
    write_pico_data(folder)
    return folder


@pytest.fixture(scope="module")
def pico():
    return load("pico")


def test_every_task_of_the_paper_scores_pico_on_every_row(data, pico):
    suite = read_suite("paper", data)
    scores = Engine(suite, data=data, allow_code=True).score(*pico)
    assert list(scores) == ["mmlu", "scienceqa", "gsm8k", "humaneval"]
    for task in scores.values():
        assert task.score is not None
        assert len(task.score) == len(task.likelihood) == TEST_ROWS
        assert 0 < sum(task.likelihood) / TEST_ROWS < 60  # it knows nothing, and is not sure of anything


def test_ten_samples_of_a_function_and_the_perplexity_of_the_text_are_measured(data, pico):
    code = Engine(read_suite("humaneval_10", data), data=data, limit=1, allow_code=True).score(*pico)
    assert set(code["humaneval_10"].others) == {"pass@5", "pass@10"}
    text = Engine(read_suite("wikitext", data), data=data).score(*pico)
    assert text["wikitext"].others["word_perplexity"] > 1000


@pytest.mark.parametrize("name", TRAINING)
def test_every_training_row_fits_a_short_sequence(data, pico, name):
    _, report = encode_examples(pico[1], load_examples(data / f"{name}.jsonl"), LENGTH)
    assert report.warnings(LENGTH) == []
    assert report.sequences == report.examples == 64


@pytest.mark.parametrize("name", TRAINING)
def test_a_recipe_names_pico_and_three_steps_lower_its_loss(data, tmp_path, name, capsys):
    recipe = {
        "model": "pico",
        "data": {"path": str(data / f"{name}.jsonl"), "held_out_fraction": 0.25},
        "method": {"name": "hiplora", "principal_rank": 8},
        "train": {"steps": 3, "batch_size": 8, "gradient_accumulation": 1, "max_length": LENGTH, "lr": 1e-2},
        "out": str(tmp_path / "out"),
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.raises(SystemExit) as stop:
        frame.main(["train", str(tmp_path / "recipe.yaml"), "--json"])
    assert stop.value.code == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 3
    assert result["held_out"]["after"] < result["held_out"]["before"] - 0.1
