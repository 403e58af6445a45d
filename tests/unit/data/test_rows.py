"""Rows are read with their places; what is wrong with a file or a row is said with the way out."""

import gzip
import json

import pytest

from hiplora.data.examples import DataSettings, as_examples, load_data
from hiplora.data.rows import check_rows, is_hub_name, read_rows
from hiplora.errors import DataError
from tests.tiny import write_jsonl

ROWS = [{"text": "ä"}, {"text": "b"}]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", "-lines.json"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(ROWS), path)
    else:
        lines = "jsonl" in suffix or "lines" in suffix
        text = "\n\n".join(map(json.dumps, ROWS)) if lines else json.dumps(ROWS)
        path.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else b"\xef\xbb\xbf" + text.encode())
    assert [row for _, row in read_rows(path)] == ROWS
    (tmp_path / "one.json").write_text(json.dumps(ROWS[0]))
    assert [row for _, row in read_rows(tmp_path / "one.json")] == ROWS[:1]


def test_tables_and_texts_are_rows_too(tmp_path):
    (tmp_path / "a.csv").write_text('question,answer\nOne?,"1,\n2"\nTwo?,2\n')
    assert list(read_rows(tmp_path / "a.csv")) == [
        ("line 3", {"question": "One?", "answer": "1,\n2"}),
        ("line 4", {"question": "Two?", "answer": "2"}),
    ]
    (tmp_path / "a.tsv").write_text("text\nOne, two\n")  # a single column
    assert list(read_rows(tmp_path / "a.tsv")) == [("line 2", {"text": "One, two"})]
    (tmp_path / "a.txt").write_text("All\n\nof it")
    assert [row for _, row in read_rows(tmp_path / "a.txt")] == [{"text": "All\n\nof it"}]


@pytest.mark.parametrize("line", ['"Hi" he said,1', '"Hi,1\nBye,2'], ids=["quoted word", "open quote"])
def test_a_csv_text_that_would_lose_quotes_or_take_in_other_rows_is_an_error_with_its_line(tmp_path, line):
    (tmp_path / "a.csv").write_text(f"question,answer\nOk?,0\n{line}\n")
    with pytest.raises(DataError, match=r"a\.csv, line 3: not valid CSV .* double those inside"):
        list(read_rows(tmp_path / "a.csv"))


TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]


@pytest.mark.parametrize(
    ("row", "learn_from"),
    [
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}]}, None),
        ({"prompt": TALK[:1], "completion": TALK[1:]}, 1),
        ({"prompt": TALK[:1], "completion": "Yes?"}, 1),
        ({"conversations": TALK}, None),
        ({"messages": [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in TALK]}, None),
        ({"messages": TALK, "system": ""}, None),
    ],
)
def test_sharegpt_and_conversational_prompts_become_messages(row, learn_from):
    asked = "prompt_completion" if learn_from else "auto"
    format, ((_, checked),) = check_rows([("row 1", row)], asked, "rows")
    assert (format, checked["messages"], checked.get("learn_from")) == ("messages", TALK, learn_from)


def test_a_system_message_and_tools_that_stand_apart_are_read():
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}]
    rows = [{"conversations": talk, "system": "Be brief.", "tools": '[{"name": "look"}]'}]
    rows.append({"prompt": TALK[:1], "completion": TALK[1:], "system": "Be brief."})
    _, ((_, whole), (_, learned)) = check_rows([("row 1", row) for row in rows], "auto", "rows")
    assert whole["messages"] == learned["messages"] == [{"role": "system", "content": "Be brief."}, *TALK]
    assert (whole["tools"], learned["learn_from"]) == ([{"name": "look"}], 2)


def test_rows_with_a_system_message_or_a_history_beside_them_are_conversations():
    rows = [
        {"instruction": "Add 1.", "input": "2", "output": "3", "history": [["Hi", "Yes?"]], "system": ""},
        {"instruction": "And 4?", "input": "", "output": "5", "history": [], "system": "Be brief."},
        {"instruction": "And 5?", "output": "6"},
    ]
    format, checked = check_rows([(f"row {n}", row) for n, row in enumerate(rows)], "auto", "rows")
    said = [[(message["role"], message["content"]) for message in row["messages"]] for _, row in checked]
    assert format == "messages"
    assert said[0] == [("user", "Hi"), ("assistant", "Yes?"), ("user", "Add 1.\n\n2"), ("assistant", "3")]
    assert said[1:] == [
        [("system", "Be brief."), ("user", "And 4?"), ("assistant", "5")],
        [("user", "And 5?"), ("assistant", "6")],
    ]
    assert check_rows([("row 1", {**rows[2], "history": []})], "auto", "rows")[0] == "alpaca"
    _, ((_, held_out),) = check_rows([("row 1", rows[2])], format, "rows")  # other rows of the data have a history
    assert held_out["messages"] == checked[2][1]["messages"]


@pytest.mark.parametrize(
    ("row", "format", "text"),
    [
        ({"instruction": "Sort.", "context": "b a", "response": "a b", "category": "x"}, "alpaca", "a b"),
        ({"problem": "1 + 1?", "solution": "2", "source": "x"}, "question_answer", "2"),
        ({"system_prompt": "Be brief.", "question": "Which?", "response": "tea"}, "messages", "Which?\n\ntea"),
        ({"question": "Is it?", "passage": "It is.", "answer": "yes"}, "question_answer", "It is.\n\n## Answer\nyes"),
        ({"text": "Write it.", "code": "def f(): ...", "test_list": []}, "prompt_completion", "def f(): ..."),
    ],
)
def test_fields_of_popular_data_sets_are_known(row, format, text):
    recognised, checked = check_rows([("row 1", row)], "auto", "rows")
    (example,) = as_examples(recognised, checked)
    assert recognised == format
    assert example.whole.endswith(text)


def test_tool_calls_are_objects_and_have_what_their_own_row_says_in_tables_too(tmp_path):
    from pyarrow import Table, parquet

    calls = [{"function": {"name": "tide", "arguments": {"day": 1}}}, {"function": {"name": "moon", "arguments": {}}}]
    text = [{"function": {"name": "tide", "arguments": '{"day": 1}'}}]
    talks = [[TALK[0], {"role": "assistant", "content": "", "tool_calls": [call]}] for call in calls]
    parquet.write_table(Table.from_pylist([{"messages": talk} for talk in talks]), tmp_path / "rows.parquet")
    _, ((_, tide), (_, moon)) = check_rows(read_rows(tmp_path / "rows.parquet"), "auto", "rows")
    assert (tide["messages"], moon["messages"][1]["tool_calls"][0]["function"]["name"]) == (talks[0], "moon")
    assert "day" not in str(moon)
    row = {"messages": [{**TALK[0], "tool_calls": None}, {"role": "assistant", "content": "", "tool_calls": text}]}
    _, ((_, checked),) = check_rows([("row 1", row)], "auto", "rows")
    assert checked["messages"] == talks[0]


GOOD = {
    "messages": {"messages": TALK, "tools": [], "system": "Be brief."},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}]},
    "trl": {"prompt": TALK[:1], "completion": TALK[1:]},
    "alpaca": {"instruction": "Sort.", "input": "b a", "output": "a b"},
    "history": {"instruction": "Sort.", "context": "b a", "response": "a b", "history": [["c", "d"]], "system": "e"},
    "openorca": {"system_prompt": "Be brief.", "question": "Which?", "response": "tea"},
    "prompt_completion": {"prompt": "a", "completion": "b"},
    "prompt_response": {"prompt": "a", "response": "b"},
    "multiple_choice": {"question": "Which?", "choices": ["ice", "tea"], "answer": 1, "context": "Drinks."},
    "question_answer": {"question": "Which?", "answer": "tea", "context": "Drinks."},
    "query_response": {"query": "Which?", "response": "tea"},
    "text": {"text": "a"},
}
ODD = (None, 3, -1, 1.5, True, "", " ", "\ud800", [], ["x"], [None], [[]], [{}], {}, {"from": ["x"]}, {"x": {"y": 1}})
SAID = ({"role": "user", "content": "Hi"}, {"from": "gpt", "value": "a"})
ODD_MESSAGES = [
    *([{**one, field: value}] for one in SAID for field in one for value in ODD),
    *([{**SAID[1], "value": [{"type": kind, "text": value}]}] for kind in ("text", "image") for value in ODD),
]


@pytest.mark.parametrize("name", GOOD)
def test_no_odd_value_of_a_field_ends_in_anything_but_its_line(tmp_path, name):
    path, good = tmp_path / "rows.json", GOOD[name]
    fields = {*good, "learn_from", "tools", "system", "context", "messages", "conversations", "completion"}
    rows = [{**good, field: value} for field in fields for value in ODD]
    rows += [{**good, field: value} for field in ("messages", "conversations", "prompt") for value in ODD_MESSAGES]
    for row in [*rows, *({key: value for key, value in good.items() if key != field} for field in good), *ODD]:
        path.write_text(json.dumps([row]))
        said = str(path)
        try:
            assert load_data(DataSettings(path=str(path))).train[0].whole.strip()
        except DataError as error:
            said = str(error)
        assert str(path) in said


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", b'{"x": 1}\n{"prompt": 1, "completion": "b"}\n{"prompt": "a", "completion": "b"}\n'),
        ("rows.jsonl", b'3\n{"text": 1}\n{"prompt": "a", "completion": "b"}\n'),
        ("rows.csv", b"prompt,completion\na,\xe9\nx,\na,b\n"),
        ("rows.csv", b"prompt,completion\na,b, or c\na,b, or d\na,b,\n"),
        ("rows.json", b'[{"prompt": "a", "completion": "\xe9"}, {"text": " "}, {"prompt": "a", "completion": "b"}]'),
        ("rows.json", b'{"prompt": "a"}\n{"prompt"\n{"prompt": "a", "completion": "b"}\n'),
    ],
)
def test_bad_rows_are_left_out_wherever_they_stand(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    data = load_data(DataSettings(path=str(tmp_path / name), skip_bad_rows=True))
    assert [(one.prompt, one.response) for one in data.train] == [("a", "b")]
    assert data.notes[0].startswith("2 rows are left out")


def test_a_file_without_a_good_row_is_named_by_its_own_bad_rows(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, *[{"prompt": "a"}] * 12]
    train, held_out = write_jsonl(tmp_path / "a.jsonl", rows), write_jsonl(tmp_path / "b.jsonl", rows[1:2])
    with pytest.raises(DataError) as raised:
        load_data(DataSettings(path=str(train), held_out=str(held_out), skip_bad_rows=True))
    assert "b.jsonl, line 1: completion: Field required" in str(raised.value)
    assert "a.jsonl" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.jsonl", None, "no such file"),
        ("rows.xlsx", b"a,b", "not a data file"),
        ("rows.jsonl", b"", "is empty"),
        ("rows.jsonl", b'{"text": "a"}\n{"text"', r"line 2: not valid JSON"),
        ("rows.json", b'{"text": "a"', r"line 1: not valid JSON"),
        ("rows.json", b'"a"', "expected a list of rows"),
        ("rows.jsonl", '{"text": "a"}'.encode("utf-16"), "line 1: not UTF-8, .* looks like UTF-16;"),
        ("rows.csv", "日本語,answer\nOne?,Two\n".encode("utf-16-le"), "not UTF-8, .* looks like UTF-16LE;"),
        *[
            (name, '[{"text": "a ä"}]'.encode(wide), f"line 1: not UTF-8, .* looks like {wide};")
            for wide in ("UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE", "UTF-32")
            for name in ("rows.jsonl", "rows.json", "rows.csv")
        ],
        ("rows.jsonl", b'{"text": "a"}\n{"text": "\x80"}', "line 2: not UTF-8 .* looks like WINDOWS-1252"),
        ("rows.csv", b"question,answer\nOne?,1, or 2\n", "line 2: has more fields than the header; put texts"),
        ("rows.jsonl", b"[" * 100_000, "line 1: not valid JSON"),
        ("rows.jsonl", b'{"n": ' + b"9" * 5000 + b"}", "line 1: not valid JSON"),
        ("rows.jsonl.gz", b"plain", "not readable as gzip"),
        ("rows.parquet", b"plain", "not a readable parquet file"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, name, content, said):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        list(read_rows(path))


CHOICE = {"question": "Which is warm?", "choices": ["ice", "tea"], "answer": 1}
PROMPTS = ("a", TALK[:1])


@pytest.mark.parametrize(
    ("format", "row", "said"),
    [
        ("text", {"txt": "a"}, r"text: Field required \(found txt\)"),
        ("text", {"text": None}, "text: is null"),
        ("question_answer", {"question": "a", "answer": " "}, "answer: .*is empty"),
        ("messages", {"messages": []}, "nothing to learn"),
        ("messages", {"messages": [{"role": "user", "content": "a"}]}, "no assistant message"),
        ("messages", {"messages": [{**TALK[1], "content": None}]}, "content: .*only a message with tool_calls"),
        ("messages", {"messages": [*TALK, TALK[0], {**TALK[1], "content": " "}]}, "an empty one at the end"),
        ("messages", {"messages": [TALK[0], {**TALK[1], "weight": 0}]}, "nothing to learn"),
        ("messages", {"messages": [TALK[0], {**TALK[1], "weight": 0.5}]}, "weight: Input should be 0 or 1"),
        ("text", {"text": "cut \ud83d"}, "half a character"),
        *(("auto", {"prompt": a, "chosen": "b", "rejected": "c"}, "preference pair") for a in PROMPTS),
        *(("auto", {"prompt": a, "completion": "b", "label": False}, "label is false: .*KTO") for a in PROMPTS),
        ("auto", {**CHOICE, "system": "Be brief."}, "system would be lost, .*as `messages`"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["c", "d"]]}, "history would be lost"),
        ("auto", {"instruction": "a", "output": "b", "history": "c"}, "history would be lost"),
        ("multiple_choice", {**CHOICE, "answer": -1}, "answer: .*-1 is not the index of a choice, 0 to 1"),
        ("messages", {"conversations": [{"from": ["x"], "value": "a"}]}, "messages.0.role: Input should be"),
        ("multiple_choice", {**CHOICE, "choices": ["one"]}, "choices: List should have at least 2 items"),
    ],
)
def test_a_row_that_does_not_fit_is_named_with_its_place(format, row, said):
    with pytest.raises(DataError, match=f"rows.jsonl, line 4: .*{said}"):
        check_rows([("line 4", row)], format, "rows.jsonl")


def test_many_problems_are_counted_and_no_rows_are_an_error():
    with pytest.raises(DataError, match="and 5 more"):
        check_rows([(f"line {n}", {}) for n in range(15)], "text", "rows.jsonl")
    with pytest.raises(DataError, match="has no rows"):
        check_rows([], "auto", "rows.jsonl")
    with pytest.raises(DataError, match="unknown format, found the fields label"):
        check_rows([("line 1", {"label": 1})], "auto", "rows.jsonl")


def test_a_path_or_a_file_goes_before_a_data_set_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = ("notes.txt", "data/notes.txt", "data/rows.jsonl", "/a/b", "one", "a/b/c")
    assert not any(map(is_hub_name, paths))
    assert is_hub_name("harbour/logs:long")
    assert is_hub_name("harbour/logs")
    (tmp_path / "harbour").mkdir()
    (tmp_path / "harbour" / "logs").write_text("Low water.")
    assert not is_hub_name("harbour/logs")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_columns_are_separated_by_what_the_header_has_most_of(tmp_path, delimiter):
    lines = [["question", "answer"], ["2,5; or 3?", "ab" * 100_000]]
    path = tmp_path / "rows.csv"
    path.write_text("".join(delimiter.join(f'"{cell}"' for cell in line) + "\r\n" for line in lines))
    assert [row for _, row in read_rows(path)] == [{"question": "2,5; or 3?", "answer": "ab" * 100_000}]
