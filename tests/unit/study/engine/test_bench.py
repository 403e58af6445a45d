"""What a worker reads of the drift texts."""

import datasets
import pytest

from hiplora.errors import DataError
from hiplora.study.engine.bench import Bench, Place
from hiplora.study.engine.store import Store
from tests.tiny import write_jsonl


@pytest.fixture
def bench(tmp_path):
    rows = [{"title": f"T{n}", "text": f"Text {n}."} for n in range(5)]
    write_jsonl(tmp_path / "wiki.jsonl", rows)
    return Bench(Store(tmp_path / "store"), Place("pico", tmp_path))


def test_rows_are_one_text_or_texts_of_their_own(bench):
    assert bench.text("wiki.jsonl") == "Text 0.Text 1.Text 2.Text 3.Text 4."
    assert bench.documents("wiki.jsonl", 2) == ["Text 0.", "Text 1."]
    assert bench.documents("wiki.jsonl:title+text", 1) == ["T0Text 0."]
    assert len(bench.documents("wiki.jsonl", 100)) == 5


def test_no_more_rows_of_the_hub_are_fetched_than_are_read(bench, monkeypatch):
    asked = []

    def load_dataset(name, config, split, streaming):
        # A row by the fields that the hub documents for finewiki.
        for number in range(100):
            asked.append((name, config, split, streaming))
            yield {
                "text": f"Article {number}",
                "id": f"enwiki/{number}",
                "title": "A",
                "url": "",
                "wikiname": "enwiki",
            }

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert bench.documents("HuggingFaceFW/finewiki", 3) == ["Article 0", "Article 1", "Article 2"]
    assert asked == [("HuggingFaceFW/finewiki", None, "train", True)] * 3


def test_a_data_set_that_cannot_be_had_is_named(bench, monkeypatch):
    def load_dataset(*given, **named):
        raise datasets.exceptions.DatasetNotFoundError("it is not there")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="owner/name: no such file, and no data set on the hub"):
        bench.documents("owner/name:title", 3)
