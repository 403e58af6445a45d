"""Text to calibrate on: from a file, from training rows, from a data set on the hub."""

import datasets
import pytest
import torch

from hiplora.data.rows import is_hub_name
from hiplora.data.texts import calibration_rows, describe_source
from hiplora.errors import DataError
from tests.tiny import tiny_tokenizer, write_jsonl

BOS = 256


def text_of(rows):
    return tiny_tokenizer().decode(torch.cat([row[1:] if row[0] == BOS else row for row in rows]))


def test_a_text_is_cut_into_rows_of_256(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("The tide comes in. " * 60)
    rows = calibration_rows(tiny_tokenizer(), file, 600)
    assert [len(row) for row in rows] == [256, 256, 88]
    assert text_of(rows) == file.read_text()[:600]
    assert describe_source(file) == "file a.txt"


def test_of_training_rows_prompt_and_response_stand_together(tmp_path):
    file = write_jsonl(
        tmp_path / "a.jsonl",
        [{"prompt": "One?", "completion": " Two."}, {"prompt": "A?", "completion": " B."}],
    )
    assert text_of(calibration_rows(tiny_tokenizer(), file, 50)) == "One? Two.\n\nA? B."


@pytest.fixture
def hub(monkeypatch):
    """A hub with one data set of many rows; it counts what is read and knows what was asked for."""
    asked = {"rows": 0}

    def load_dataset(name, config, split, streaming):
        asked.update(name=name, config=config, split=split, streaming=streaming)
        if name != "harbour/logs":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")

        def rows():
            for index in range(10_000):
                asked["rows"] += 1
                yield {"text": f"Ship {index} came in.", "id": index}

        return rows()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_data_set_on_the_hub_is_read_as_far_as_it_is_needed(hub):
    rows = calibration_rows(tiny_tokenizer(), "harbour/logs:long", 100)
    assert text_of(rows).startswith("Ship 0 came in.\n\nShip 1 came in.")
    assert sum(map(len, rows)) == 100
    assert (hub["name"], hub["config"], hub["split"], hub["streaming"]) == (
        "harbour/logs",
        "long",
        "train",
        True,
    )
    assert hub["rows"] < 100
    assert describe_source("harbour/logs:long") == "data set harbour/logs:long"


def test_a_name_that_is_nowhere_is_said_to_be_neither_file_nor_data_set(hub):
    with pytest.raises(
        DataError, match=r"harbour/lost: no such file, and no data set on the hub .*doesn't exist"
    ):
        calibration_rows(tiny_tokenizer(), "harbour/lost", 100)


def test_a_file_goes_before_a_data_set_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("harbour/logs")
    (tmp_path / "harbour").mkdir()
    (tmp_path / "harbour" / "logs").write_text("Low water.")
    assert not is_hub_name("harbour/logs")
    assert text_of(calibration_rows(tiny_tokenizer(), "harbour/logs", 100)) == "Low water."


@pytest.mark.parametrize("name", ["notes.txt", "data/notes.txt", "data/rows.jsonl", "/a/b", "one", "a/b/c"])
def test_what_looks_like_a_path_is_none_of_the_hubs_names(name):
    assert not is_hub_name(name)
