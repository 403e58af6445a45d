"""What a worker reads of the drift texts."""

from hiplora.study.steps import Context
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
