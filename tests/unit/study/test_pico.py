"""The smallest model and its data: the same bits everywhere, the published sets' fields, no test row in training."""

import hashlib
import json

import pytest

from hiplora.models import load
from hiplora.study.pico import write_pico_data

WEIGHTS = "6ceedeafc404a55c8358e6220fec5eae4d1d07f4130701b65a50215f46be3850"  # in the order of their names
DATA = "9919e0020c8bec9a"


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return {path.stem: path for path in write_pico_data(tmp_path_factory.mktemp("pico"))}


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_weights_are_the_same_bits_everywhere():
    found = hashlib.sha256()
    model, tokenizer = load("pico")
    for _, tensor in sorted(model.state_dict().items()):
        found.update(tensor.numpy().tobytes())
    assert found.hexdigest() == WEIGHTS
    assert len(tokenizer) == 512
    assert tokenizer.decode(tokenizer("Mona has 12 pears.")["input_ids"]) == "Mona has 12 pears."


def test_the_data_are_the_same_bytes_everywhere(paths):
    found = hashlib.sha256(b"".join(paths[name].read_bytes() for name in sorted(paths)))
    assert found.hexdigest()[:16] == DATA


def test_no_test_question_is_in_the_training_rows(paths):
    for test, train in (("gsm8k_test", "gsm8k_train"), ("scienceqa_test", "scienceqa_train")):
        asked = {row["question"] + str(sorted(row.get("choices", ()))) for row in rows(paths[train])}
        assert not any(
            row["question"] + str(sorted(row.get("choices", ()))) in asked for row in rows(paths[test])
        )


def test_neighbours_of_an_edit_have_its_true_answer(paths):
    edits = rows(paths["counterfact"])
    assert len(edits) == 24
    for edit in edits:
        assert edit["target_new"] != edit["target_true"]
        assert set(edit["neighborhood_answers"]) == {edit["target_true"]}
        assert not any(edit["subject"] in prompt for prompt in edit["neighborhood_prompts"])
