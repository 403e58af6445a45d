"""What a worker reads of the drift texts, and how it chooses among results."""

import pytest

from hiplora.errors import DataError
from hiplora.study.jobs import Job
from hiplora.study.steps import Context, collect
from hiplora.study.store import Place
from tests.tiny import write_jsonl


def test_rows_are_one_text_or_texts_of_their_own(tmp_path):
    write_jsonl(tmp_path / "wiki.jsonl", [{"title": f"T{n}", "text": f"Text {n}."} for n in range(5)])
    context = Context(Place(tmp_path / "store", "pico", tmp_path))
    assert context.text("wiki.jsonl") == "Text 0.Text 1.Text 2.Text 3.Text 4."
    assert context.text("wiki.jsonl:title") == "T0\nT1\nT2\nT3\nT4"
    assert context.text("wiki.jsonl", 2) == ["Text 0.", "Text 1."]
    assert context.text("wiki.jsonl:title+text", 1) == ["T0Text 0."]
    assert context.place.located("wiki.jsonl") == str(tmp_path / "wiki.jsonl")
    assert context.place.located("owner/name") == "owner/name"
    assert Place(tmp_path, "pico").located("wiki.jsonl") == "wiki.jsonl"


@pytest.mark.parametrize(("source", "line"), [("wiki.jsonl:body", 1), ("wiki.jsonl:text", 2)])
def test_a_row_without_the_field_of_a_drift_text_is_named_with_those_that_it_has(tmp_path, source, line):
    write_jsonl(tmp_path / "wiki.jsonl", [{"title": "T", "text": "A text."}, {"title": "T", "text": None}])
    with pytest.raises(DataError, match=rf"line {line}: has no text '\w+'; its fields are title, text: name some as"):
        Context(Place(tmp_path / "store", "pico", tmp_path)).text(source)


@pytest.mark.parametrize(("best", "at_the_edge"), [(0.3, False), (0.1, True), (1.0, True)])
def test_the_edges_of_a_grid_are_its_least_and_largest_values_in_whatever_order_they_stand(
    tmp_path, best, at_the_edge
):
    context, needs = Context(Place(tmp_path, "pico")), {}
    for value in (0.3, 1.0, 0.1):
        needs[str(value)] = Job("train", 1, f"train {value}", {"value": value})
        context.store.finish(needs[str(value)], {"loss": 1.0 + (value != best)}, {}, artifact=False)
    settings = {"field": "loss", "candidates": [{"value": float(name), "needs": [name]} for name in needs]}
    result, _ = collect(context, Job("collect", 1, "choose", settings, needs), settings)
    assert (result["value"], result["at_the_edge"]) == (best, at_the_edge)
