"""What a worker reads of the drift texts."""

import datasets
import pytest

from hiplora.errors import DataError
from hiplora.study.context import Context, Place, located
from tests.tiny import write_jsonl


@pytest.fixture
def context(tmp_path):
    write_jsonl(tmp_path / "wiki.jsonl", [{"title": f"T{n}", "text": f"Text {n}."} for n in range(5)])
    return Context(Place(tmp_path / "store", "pico", tmp_path))


def test_rows_are_one_text_or_texts_of_their_own(context):
    assert context.text("wiki.jsonl") == "Text 0.Text 1.Text 2.Text 3.Text 4."
    assert context.text("wiki.jsonl:title") == "T0\nT1\nT2\nT3\nT4"
    assert context.text("wiki.jsonl", 2) == ["Text 0.", "Text 1."]
    assert context.text("wiki.jsonl:title+text", 1) == ["T0Text 0."]


def test_files_of_the_data_folder_win_over_hub_names(context, tmp_path):
    assert located("wiki.jsonl", tmp_path) == str(tmp_path / "wiki.jsonl")
    assert located("owner/name", tmp_path) == "owner/name"
    assert located("wiki.jsonl", None) == "wiki.jsonl"


def test_only_the_rows_that_are_read_are_fetched_from_the_hub(context, monkeypatch):
    fetched = []

    def load_dataset(name, config, split, streaming):
        for number in range(100):
            fetched.append((name, config, split, streaming))
            yield {"text": f"Article {number}", "id": f"enwiki/{number}"}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert context.text("HuggingFaceFW/finewiki", 3) == ["Article 0", "Article 1", "Article 2"]
    assert fetched == [("HuggingFaceFW/finewiki", None, "train", True)] * 3


def test_a_data_set_that_cannot_be_fetched_is_named(context, monkeypatch):
    def load_dataset(*given, **named):
        raise datasets.exceptions.DatasetNotFoundError("it is not there")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"owner/name: no such file, and no .*data set on the hub"):
        context.text("owner/name:title", 3)
