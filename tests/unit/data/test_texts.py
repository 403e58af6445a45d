"""Texts to measure drift on, and to calibrate a basis on."""

import textwrap
from pathlib import Path

import datasets
import pytest
import torch

from hiplora.data.texts import calibration_rows, describe_source, drift_texts, overlap, text_source
from hiplora.errors import DataError
from tests.tiny import tiny_llama, tiny_tokenizer, write_jsonl


def test_the_built_in_texts_are_prose_and_code_of_this_python_and_always_the_same():
    texts = drift_texts()
    assert list(texts) == ["prose", "python code"]
    assert texts["prose"].count(". ") > 40
    assert texts["python code"][:3600] == Path(textwrap.__file__).read_text(encoding="utf-8")[1000:4600]
    assert all(len(text) > 10_000 for text in texts.values())  # enough for 2048 tokens of four to five characters


def test_a_file_replaces_the_built_in_texts(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("Grüße an alle.", encoding="utf-8")
    assert drift_texts(file) == {"mine.txt": "Grüße an alle."}
    assert "mine.txt" in text_source(file)
    assert "Python 3" in text_source()


@pytest.mark.parametrize(
    ("content", "said"), [(None, "cannot be read"), (b" \n", "is empty"), (b"ab\xff", "not UTF-8")]
)
def test_a_file_without_text_is_an_error_that_names_it(tmp_path, content, said):
    file = tmp_path / "bad.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=rf"bad\.txt.*{said}"):
        drift_texts(file)


def test_overlap_is_the_share_of_passages_that_were_trained_on():
    text = "".join(f"Sentence number {i:03d} of a text. " for i in range(32))
    assert overlap({"t": text}, ["something else", "and more"]) == {"t": 0.0}
    assert overlap({"t": text}, ["before " + text + " after"]) == {"t": 1.0}
    assert 0.3 < overlap({"t": text}, [text[: len(text) // 2]])["t"] < 0.6
    assert overlap({"t": "short"}, ["a short one"]) == {"t": 1.0}


BOS = 256


def text_of(rows):
    return tiny_tokenizer().decode(torch.cat([row[1:] if row[0] == BOS else row for row in rows]))


def test_a_text_is_cut_into_rows_of_256(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("The tide comes in. " * 60)
    rows = calibration_rows(tiny_tokenizer(), file, 600, tiny_llama())
    assert [len(row) for row in rows] == [256, 256, 88]
    assert text_of(rows) == file.read_text()[:600]
    assert describe_source(file) == "file a.txt"


def test_of_training_rows_prompt_and_response_stand_together(tmp_path):
    rows = [{"prompt": "One?", "completion": " Two."}, {"prompt": "A?", "completion": " B."}]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    assert text_of(calibration_rows(tiny_tokenizer(), file, 50, tiny_llama())) == "One? Two.\n\nA? B."


@pytest.fixture
def hub(monkeypatch):
    """A hub with one data set of many rows, texts or (`talks`) conversations; returns the requests, and rows read."""
    requests = []

    def load_dataset(name, config, **options):
        requests.append((name, config, options))
        if name != "harbour/logs":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
        texts = (f"Ship {index} came in." for index in range(10_000))
        talk = [{"role": "user", "content": "News?"}]
        rows = (
            {"messages": [*talk, {"role": "assistant", "content": text}]} if config == "talks" else {"text": text}
            for text in texts
        )
        return (requests.append(row) or row for row in rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return requests


@pytest.mark.parametrize(
    ("config", "text"),
    [("long", "Ship 0 came in.\n\nShip 1 came in."), ("talks", "News?\n\nShip 0 came in.\n\nNews?")],
)
def test_a_data_set_on_the_hub_is_read_as_far_as_it_is_needed(hub, config, text):
    rows = calibration_rows(tiny_tokenizer(), f"harbour/logs:{config}", 100, tiny_llama())
    assert text_of(rows).startswith(text)
    assert sum(map(len, rows)) == 100
    assert hub[0] == ("harbour/logs", config, {"split": "train", "streaming": True})
    assert len(hub) < 100
    assert describe_source(f"harbour/logs:{config}") == f"data set harbour/logs:{config}"


def test_a_name_that_is_nowhere_is_said_to_be_neither_file_nor_data_set(hub):
    with pytest.raises(DataError, match=r"harbour/lost: no such file, and no data set on the hub .*doesn't exist"):
        calibration_rows(tiny_tokenizer(), "harbour/lost", 100, tiny_llama())
