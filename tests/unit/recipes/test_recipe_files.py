"""Rows of data files: read with their places, and refused with their places."""

import gzip
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from hiplora.data.rows import check_rows, read_rows
from hiplora.errors import DataError
from hiplora.recipes.shapes import detect_shape

ROWS = [{"text": "one"}, {"text": "zwei ü"}]


def write(path, text):
    data = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl", LINES.replace("\n", "\n\n")),
        ("a.jsonl", "\ufeff" + LINES),
        ("a.ndjson", LINES),
        ("a.jsonl.gz", LINES),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=1)),
        ("a.json", LINES),
        ("a.json.gz", json.dumps(ROWS)),
    ],
)
def test_every_way_to_write_json_is_read(tmp_path, name, text):
    assert [row for _, row in read_rows(write(tmp_path / name, text))] == ROWS


def test_parquet_is_read(tmp_path):
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert list(read_rows(tmp_path / "a.parquet")) == [("row 1", ROWS[0]), ("row 2", ROWS[1])]


def test_places_are_lines_of_the_file(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\n\n{"text": "three"}\n')
    assert [place for place, _ in read_rows(path)] == ["line 1", "line 3"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', "line 2: not valid JSON"),
        ("a.json", '[{"a": 1},\n{"a" 2}]', "line 2: not valid JSON"),
        ("a.json", "3", "expected a list of rows"),
        ("a.jsonl", b"\xff\xfe{}", "cannot be read as JSON"),
        ("a.parquet", b"not parquet at all", "not a readable parquet file"),
        ("a.jsonl", b"", "is empty"),
        ("a.csv", "a,b\n", "unknown kind of file"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path, name, text, said):
    with pytest.raises(DataError, match=said) as caught:
        list(read_rows(write(tmp_path / name, text)))
    assert str(tmp_path / name) in str(caught.value)


def test_a_truncated_gzip_file_is_an_error_and_no_short_data_set(tmp_path):
    whole = gzip.compress(LINES.encode() * 50)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(DataError, match="cannot be read as gzipped JSON"):
        list(read_rows(tmp_path / "a.jsonl.gz"))


def test_a_missing_file_names_its_neighbours(tmp_path):
    write(tmp_path / "rows.jsonl", LINES)
    with pytest.raises(DataError, match=r"no such file.*rows\.jsonl"):
        list(read_rows(tmp_path / "row.jsonl"))


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"instruction": "a", "output": "b"}, "alpaca"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"prompt": "a", "response": "b"}, "prompt_completion"),
        ({"question": "a", "answer": "b"}, "question_answer"),
        ({"messages": []}, "messages"),
        ({"text": "a", "id": 3}, "text"),
        ({"title": "a"}, None),
        (["text"], None),
    ],
)
def test_the_shape_is_read_off_a_rows_fields(row, shape):
    assert detect_shape(row) == shape


def rows(*values):
    return [(f"line {number}", value) for number, value in enumerate(values, start=1)]


SAID = {"role": "assistant", "content": "hi"}


@pytest.mark.parametrize(
    ("shape", "bad", "said"),
    [
        ("alpaca", {"instruction": "a"}, "`output` is missing"),
        ("alpaca", {"instruction": " ", "output": "b"}, "`instruction` is empty"),
        ("alpaca", {"instruction": "a", "input": 3, "output": "b"}, "`input` is int"),
        ("prompt_completion", {"prompt": "a", "completion": ""}, "`completion` is empty"),
        ("prompt_completion", {"prompt": ["a"], "completion": "b"}, "`prompt` is list"),
        ("question_answer", {"question": "a", "answer": 2, "choices": []}, "`answer` is int"),
        ("text", {"text": None}, "`text` is NoneType"),
        ("text", "bare", "expected an object"),
        ("messages", {"messages": []}, "missing or not a list"),
        ("messages", {"messages": [{"role": "user", "content": "a"}]}, "no assistant message"),
        ("messages", {"messages": [{"role": "human", "content": "a"}, SAID]}, "role 'human'"),
        ("messages", {"messages": [{"role": "user", "content": None}, SAID]}, "no text `content`"),
    ],
)
def test_a_row_without_what_its_shape_needs_is_named_with_its_line(shape, bad, said):
    with pytest.raises(DataError, match=said) as caught:
        check_rows(rows(bad), shape, "rows.jsonl")
    assert "rows.jsonl, line 1" in str(caught.value)


def test_all_bad_rows_are_listed_and_many_are_counted():
    good, bad = {"text": "a"}, {"txt": "a"}
    with pytest.raises(DataError) as caught:
        check_rows(rows(good, *[bad] * 12), "auto", "rows.jsonl")
    message = str(caught.value)
    assert "line 2:" in message
    assert "line 11:" in message
    assert "line 12:" not in message
    assert "and 2 more rows" in message


def test_no_rows_and_no_known_shape_are_errors():
    with pytest.raises(DataError, match="holds no rows"):
        check_rows([], "auto", "rows.jsonl")
    with pytest.raises(DataError, match="no known shape, found the fields title"):
        check_rows(rows({"title": "a"}), "auto", "rows.jsonl")


def test_empty_input_and_empty_prompt_are_fine():
    assert check_rows(rows({"instruction": "a", "input": None, "output": "b"}), "auto", "x")[0] == "alpaca"
    assert check_rows(rows({"prompt": "", "completion": "b"}), "auto", "x")[0] == "prompt_completion"
