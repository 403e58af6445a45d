import textwrap
from pathlib import Path

import pytest

from hiplora.data.texts import drift_texts, overlap, text_source
from hiplora.errors import DataError


def test_the_built_in_texts_are_prose_and_code_of_this_python_and_always_the_same():
    texts = drift_texts()
    assert list(texts) == ["prose", "python code"]
    assert texts == drift_texts()
    assert texts["prose"].count(". ") > 40
    assert texts["python code"].count("\n    ") > 100
    assert texts["python code"][:3600] == Path(textwrap.__file__).read_text(encoding="utf-8")[1000:4600]
    assert all(
        len(text) > 10_000 for text in texts.values()
    )  # enough for 2048 tokens of four to five characters


def test_a_file_replaces_the_built_in_texts(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("Grüße an alle.", encoding="utf-8")
    assert drift_texts(file) == {"mine.txt": "Grüße an alle."}
    assert "mine.txt" in text_source(file)
    assert "Python 3" in text_source()


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot be read"), (b"", "is empty"), (b" \n", "is empty"), (b"ab\xff", "not UTF-8")],
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
