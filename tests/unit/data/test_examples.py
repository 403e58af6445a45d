"""Rows become prompts and responses; which ones are held out depends on the data alone."""

import pytest

from hiplora.data.examples import DataSettings, Example, load_data, load_examples
from hiplora.data.prompts import final_number, instruction_prompt, normal_number
from hiplora.errors import DataError
from hiplora.provenance import file_sha256
from tests.tiny import write_jsonl

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
]
WARM = "Which is warm?\nA. ice\nB. tea\nC. snow\nAnswer:"
CHOICE = {"question": "Which is warm?", "choices": ["ice", "tea", "snow"], "answer": 1}
SUM = {"question": "What is 2 + 3?", "answer": "It is <<2+3=5>>5.\n#### 1,005"}
METAMATH = {"query": "What is 2 + 3?", "response": "2 + 3 = 5.\nThe answer is: 5"}  # fields as on the hub
STEPS = "Question: What is 2 + 3? Think step by step.\nAnswer:"
ALPACA = {"instruction": "Sort.", "input": "b a", "output": "a b"}


def examples(tmp_path, *rows, **options):
    return load_examples(write_jsonl(tmp_path / "rows.jsonl", list(rows)), **options)


@pytest.mark.parametrize(
    ("row", "template", "expected"),
    [
        (ALPACA, None, Example(instruction_prompt("Sort.", "b a"), "a b")),
        (ALPACA, "verbatim", Example("Sort.\n\nb a", "a b")),
        ({"prompt": "2+2=", "completion": "4"}, None, Example("2+2=", "4")),
        ({"prompt": "2+2=", "response": "4"}, None, Example("2+2=", "4")),
        ({"prompt": "Sing.", "completion": "la"}, "instruction", Example(instruction_prompt("Sing."), "la")),
        ({"text": "a b"}, None, Example("", "a b")),
        (SUM, None, Example(instruction_prompt(SUM["question"]), SUM["answer"])),
        (SUM, "direct", Example("Question: What is 2 + 3?\nAnswer:", " 1005")),
        (SUM, "step_by_step", Example(STEPS, SUM["answer"])),
        (METAMATH, "step_by_step", Example(STEPS, METAMATH["response"])),
        ({**SUM, "context": "Add."}, "direct", Example("Question: Add.\n\nWhat is 2 + 3?\nAnswer:", " 1005")),
        ({**METAMATH, "context": "Add."}, "verbatim", Example("What is 2 + 3?\n\nAdd.", METAMATH["response"])),
        ({**CHOICE, "context": "Drinks."}, None, Example(f"Question: Drinks.\n\n{WARM}", " B")),
        (CHOICE, None, Example(f"Question: {WARM}", " B")),
    ],
)
def test_a_row_becomes_a_prompt_and_a_response(tmp_path, row, template, expected):
    assert examples(tmp_path, row, template=template) == [expected]


def test_a_conversation_keeps_its_roles(tmp_path):
    (talk,) = examples(tmp_path, {"messages": TALK})
    assert list(talk.messages) == TALK
    assert (talk.prompt, talk.response) == ("Be brief.\n\nHi", "Hello")
    (chat,) = examples(tmp_path, ALPACA, template="chat")
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("row", "template", "said"),
    [
        ({"text": "a"}, "chat", "does not apply to text rows"),
        ({"prompt": "2+2=", "completion": "4"}, "direct", "applies to multiple_choice and question_answer rows"),
        ({"prompt": "2+2=", "completion": "4"}, "step_by_step", "applies to question_answer and query_response"),
        (METAMATH, "direct", "not to query_response"),
    ],
)
def test_a_template_that_does_not_fit_is_refused(tmp_path, row, template, said):
    with pytest.raises(DataError, match=said):
        examples(tmp_path, row, template=template)


@pytest.mark.parametrize(
    ("text", "number"),
    [("$1,005.50 a year", "1005.5"), ("-0.0", "0"), ("007", "7"), (" none ", "none"), ("-.5", "-0.5")],
)
def test_a_number_has_one_plain_form(text, number):
    assert normal_number(text) == number


@pytest.mark.parametrize(("answer", "number"), [("5 + 3 = 8", "8"), ("2 #### 7 apples", "7"), ("none", "none")])
def test_the_result_of_an_answer_is_its_last_number_or_what_follows_the_mark(answer, number):
    assert final_number({"answer": answer}) == number


@pytest.fixture
def numbers(tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", [{"text": str(number)} for number in range(50)])


def test_a_share_is_held_out_the_same_each_time_spread_over_the_file(numbers):
    data = load_data(DataSettings(path=numbers, held_out_fraction=0.1))
    assert [example.response for example in data.held_out] == ["2", "16", "24", "26", "48"]  # as in version 0.1
    assert {example.response for example in data.train + data.held_out} == {str(number) for number in range(50)}
    assert len(data.train) == 45


def test_a_held_out_file_limits_and_sources(numbers, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": f"o{number}"} for number in range(4)])
    data = load_data(DataSettings(path=numbers, held_out=other, held_out_limit=3, limit=5))
    assert [example.response for example in data.held_out] == ["o0", "o1", "o2"]
    assert [example.response for example in data.train] == ["0", "1", "2", "3", "4"]
    assert data.sources == {
        "train": {"file": "rows.jsonl", "sha256": file_sha256(numbers), "rows": 5},
        "held_out": {"file": "other.jsonl", "sha256": file_sha256(other), "rows": 3},
    }


def test_long_rows_are_left_out_before_they_are_counted(tmp_path):
    rows = [{"query": "x" * n, "response": "y" * 10} for n in (5, 9, 10, 6)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = load_data(DataSettings(path=path, max_characters=20, limit=2, template="verbatim"))
    assert [len(example.prompt) for example in data.train] == [5, 9]
    assert (data.sources["train"]["rows"], data.sources["train"]["too_long"]) == (2, 1)
    with pytest.raises(DataError, match="all 4 rows have more than 3 characters"):
        load_data(DataSettings(path=path, max_characters=3))
    with pytest.raises(DataError, match="leaves none to train on"):
        load_data(DataSettings(path=write_jsonl(path, rows[:1]), held_out_fraction=0.5))


def test_prompts_are_learned_on_demand_and_never_those_of_conversations(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{**METAMATH, "query": f"{n}?"} for n in range(4)])
    data = load_data(DataSettings(path=path, learn_prompt=True, held_out_fraction=0.25))
    assert all(example.learn_prompt for example in [*data.train, *data.held_out])
    path = write_jsonl(tmp_path / "chats.jsonl", [{"messages": TALK}] * 2)
    for setting in ({"learn_prompt": True}, {"max_characters": 10}):
        with pytest.raises(DataError, match="does not apply to conversations"):
            load_data(DataSettings(path=path, **setting))


def test_with_a_chat_template_learned_prompts_are_refused_too_and_mixed_files_have_their_own_wording(tmp_path):
    main = write_jsonl(tmp_path / "main.jsonl", [METAMATH] * 2)
    with pytest.raises(DataError, match=r"set data\.template: instruction"):
        load_data(DataSettings(path=main, template="auto", learn_prompt=True), chat=True)
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "P", "completion": "c"}])
    (tmp_path / "more").mkdir()
    texts = write_jsonl(tmp_path / "more" / "pairs.jsonl", [{"text": "a text"}])
    mix = {str(pairs): 1, str(texts): 1}
    data = load_data(DataSettings(path=main, template="auto", mix=mix), chat=True)
    assert [bool(example.messages) for example in data.train] == [True, True, False, False]
    assert [example.prompt for example in data.train[2:]] == ["P", ""]
    assert {source["sha256"] for source in data.sources.values()} == {file_sha256(f) for f in (main, pairs, texts)}


def test_a_hub_data_set_is_read_like_a_file_with_hints_and_without_pictures(monkeypatch):
    """Rows by the fields that the hub documents for ScienceQA."""
    import datasets

    asked = []
    row = {**CHOICE, "image": None, "hint": ""}
    rows = [row, {**row, "hint": "Look at the steam. "}, {**row, "image": "a picture"}]

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_data(DataSettings(hub="derek-thomas/ScienceQA", split="validation"))
    assert asked == [("derek-thomas/ScienceQA", None, "validation")]
    assert "Look at the steam.\nWhich is warm?" in data.train[1].prompt
    assert "steam" not in data.train[0].prompt
    assert len(data.train) == 2


def test_other_files_are_mixed_in_by_weight_and_copies_of_held_out_rows_are_not_trained_on(numbers, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": f"o{number}"} for number in range(8)])
    data = load_data(DataSettings(path=numbers, limit=5, mix={str(other): 1.5}))
    counts = [sum(example.response == f"o{number}" for example in data.train) for number in range(8)]
    assert sorted(counts) == [1, 1, 1, 1, 2, 2, 2, 2]
    assert data.sources["other.jsonl"]["weight"] == 1.5
    with pytest.raises(DataError, match=r"data\.mix: 0\.05 of the 8 rows of .*other\.jsonl is no row; raise"):
        load_data(DataSettings(path=numbers, mix={str(other): 0.05}))
    twice = write_jsonl(tmp_path / "twice.jsonl", [{"text": str(number % 10)} for number in range(20)])
    data = load_data(DataSettings(path=twice, held_out_fraction=0.2))
    assert not {example.response for example in data.train} & {example.response for example in data.held_out}
    assert "are copies of held-out rows" in data.notes[0]
    assert "10 of 20 rows repeat others" in load_data(DataSettings(path=twice)).notes[0]
    copies = write_jsonl(tmp_path / "copies.jsonl", [{"text": "a"}] * 9)
    with pytest.raises(DataError, match="all rows are copies of held-out rows"):
        load_data(DataSettings(path=copies, held_out_fraction=0.2))


def test_conversations_with_other_tools_are_no_copies(tmp_path):
    rows = [{"messages": TALK, "tools": [{"name": name}]} for name in ("look", "ask")]
    assert load_data(DataSettings(path=write_jsonl(tmp_path / "rows.jsonl", rows))).notes == ()


def test_bad_rows_are_counted_and_instructions_are_a_chat_where_the_model_has_a_template(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [METAMATH, {"query": "?"}, METAMATH])
    data = load_data(DataSettings(path=path, skip_bad_rows=True, template="auto"), chat=True)
    assert [message["role"] for message in data.train[0].messages] == ["user", "assistant"]
    assert "1 rows are left out" in data.notes[0]
    assert load_data(DataSettings(path=path, skip_bad_rows=True, template="auto")).train[0].messages == ()


@pytest.mark.parametrize(
    "row",
    [
        {"question": "How many?", "answer": "Two of them."},
        {"instruction": "How many?", "output": "Two of them."},
        {"conversations": [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Two of them."}]},
        {"problem": "How many?", "solution": "Two of them."},
        {"prompt": "How many?", "completion": "Two of them.", "system": "Be very brief."},
    ],
)
def test_a_text_beside_a_rows_own_that_is_not_used_is_named(tmp_path, row):
    used = write_jsonl(tmp_path / "used.jsonl", [{**row, "id": "gsm-1", "level": 3, "copy": "Two of them."}])
    assert load_data(DataSettings(path=used)).notes == ()
    unused = write_jsonl(tmp_path / "unused.jsonl", [{**row, "id": "gsm-1", "background": "There are two of them."}])
    assert load_data(DataSettings(path=unused)).notes == ("fields of the rows that are not used: background",)
