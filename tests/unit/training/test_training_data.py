"""Rows become prompts and responses; what is held back depends on the data alone."""

import re

import pytest

from hiplora.data.examples import DataSettings, Example, load_data, load_examples
from hiplora.data.prompts import instruction_prompt
from hiplora.errors import DataError
from hiplora.provenance import file_sha256
from tests.tiny import write_jsonl


def examples(tmp_path, *rows, **options):
    return load_examples(write_jsonl(tmp_path / "rows.jsonl", list(rows)), **options)


def test_a_task_is_worded_with_its_material_and_the_answer_follows_directly(tmp_path):
    (with_input, without) = examples(
        tmp_path,
        {"instruction": "Sort.", "input": "b a", "output": "a b"},
        {"instruction": "Sing.", "input": "", "output": "la"},
    )
    assert with_input == Example(instruction_prompt("Sort.", "b a"), "a b")
    assert without.prompt == instruction_prompt("Sing.")
    assert with_input.prompt.index("Sort.") < with_input.prompt.index("b a")
    assert with_input.prompt.endswith("## Answer\n")
    assert "Material" not in without.prompt


def test_each_shape_becomes_prompt_and_response(tmp_path):
    assert examples(tmp_path, {"prompt": "2+2=", "completion": "4"}) == [Example("2+2=", "4")]
    assert examples(tmp_path, {"prompt": "2+2=", "response": "4"}) == [Example("2+2=", "4")]
    assert examples(tmp_path, {"text": "a b"}) == [Example("", "a b")]
    (asked,) = examples(tmp_path, {"question": "2+2?", "answer": "4"})
    assert asked == Example(instruction_prompt("2+2?"), "4")


def test_a_conversation_keeps_its_roles(tmp_path):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    (made,) = examples(tmp_path, {"messages": messages})
    assert list(made.messages) == messages
    assert (made.prompt, made.response) == ("Be brief.\n\nHi", "Hello")


def test_a_template_words_prompts_another_way(tmp_path):
    row = {"instruction": "Sort.", "input": "b a", "output": "a b"}
    (verbatim,) = examples(tmp_path, row, template="verbatim")
    assert verbatim == Example("Sort.\n\nb a", "a b")
    (chat,) = examples(tmp_path, row, template="chat")
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    (worded,) = examples(tmp_path, {"prompt": "Sort.", "completion": "a"}, template="instruction")
    assert worded.prompt == instruction_prompt("Sort.")
    with pytest.raises(DataError, match="does not apply to text rows"):
        examples(tmp_path, {"text": "a"}, template="chat")


def test_a_limit_takes_the_first_rows(tmp_path):
    made = examples(tmp_path, *({"text": str(number)} for number in range(9)), limit=3)
    assert [example.response for example in made] == ["0", "1", "2"]


@pytest.fixture
def numbers(tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", [{"text": str(number)} for number in range(50)])


def test_a_share_is_held_back_the_same_each_time_and_nothing_is_lost(numbers):
    data = [load_data(DataSettings(path=numbers, held_out_fraction=0.2)) for _ in range(2)]
    assert data[0] == data[1]
    assert (len(data[0].train), len(data[0].held_out)) == (40, 10)
    kept = {example.response for example in data[0].train + data[0].held_out}
    assert kept == {str(number) for number in range(50)}


def test_held_out_rows_are_no_block_of_the_file(numbers):
    held_out = [
        int(e.response) for e in load_data(DataSettings(path=numbers, held_out_fraction=0.2)).held_out
    ]
    assert max(held_out) - min(held_out) > 10


def test_a_held_out_file_and_its_limit(numbers, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": f"o{number}"} for number in range(4)])
    data = load_data(DataSettings(path=numbers, held_out=other, held_out_limit=3, limit=5))
    assert [example.response for example in data.held_out] == ["o0", "o1", "o2"]
    assert len(data.train) == 5


def test_the_sources_carry_hashes_and_counts(numbers, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "o"}])
    sources = load_data(DataSettings(path=numbers, held_out=other)).sources
    assert sources["train"] == {"file": "rows.jsonl", "sha256": file_sha256(numbers), "rows": 50}
    assert sources["held_out"]["sha256"] == file_sha256(other)


def test_holding_everything_back_is_an_error(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "only"}])
    with pytest.raises(DataError, match="leaves none to train on"):
        load_data(DataSettings(path=path, held_out_fraction=0.5))


def test_a_hub_data_set_that_cannot_be_had_is_named(monkeypatch):
    with pytest.raises(DataError, match=r"data\.hub: nobody/nothing cannot be loaded"):
        load_data(DataSettings(hub="nobody/nothing"))


def test_a_hub_data_set_is_read_like_a_file(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_data(DataSettings(hub="some/set", split="validation"))
    assert [example.response for example in data.train] == ["a", "b"]
    assert asked == [("some/set", None, "validation")]
    assert data.sources["train"] == {"hub": "some/set", "config": None, "split": "validation", "rows": 2}


def test_questions_of_the_hub_have_their_hint_and_those_about_a_picture_are_left_out(monkeypatch):
    """Rows by the fields that the hub documents for ScienceQA."""
    import datasets

    row = {
        "image": None,
        "question": "Which is it?",
        "choices": ["a fox", "a hen"],
        "answer": 1,
        "hint": "",
        "task": "x",
    }
    rows = [row, {**row, "hint": "Look at the tail. "}, {**row, "image": "a picture"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    data = load_data(DataSettings(hub="derek-thomas/ScienceQA"))
    assert data.shape == "multiple_choice"
    first, second = data.train
    assert (first.response, second.response) == (" B", " B")
    assert "Look at the tail.\nWhich is it?" in second.prompt
    assert "tail" not in first.prompt


def test_a_conversation_of_the_hub_that_has_choices_too_stays_one(monkeypatch):
    import datasets

    messages = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "This."}]
    row = {"messages": messages, "question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "Look."}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([row]))
    assert load_data(DataSettings(hub="some/set")).shape == "messages"


CHOICE = {"question": "Which is warm?", "choices": ["ice", "tea", "snow"], "answer": 1}
SUM = {"question": "What is 2 + 3?", "answer": "It is <<2+3=5>>5.\n#### 1,005"}


def test_a_choice_is_asked_as_the_evaluation_asks_and_answered_with_its_letter(tmp_path):
    (example,) = load_examples(write_jsonl(tmp_path / "rows.jsonl", [CHOICE]))
    assert example.prompt == "Question: Which is warm?\nA. ice\nB. tea\nC. snow\nAnswer:"
    assert example.response == " B"


def test_a_choice_may_be_put_as_an_instruction(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [CHOICE])
    (example,) = load_examples(path, template="instruction")
    assert "C. snow" in example.prompt
    assert example.response == "B"


def test_a_question_may_be_answered_directly(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [SUM])
    (example,) = load_examples(path, template="direct")
    assert (example.prompt, example.response) == ("Question: What is 2 + 3?\nAnswer:", " 1005")
    (example,) = load_examples(path)
    assert example.response == SUM["answer"]


def test_an_instruction_has_no_direct_answer(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "Sing.", "output": "La."}])
    with pytest.raises(
        DataError, match="direct applies to multiple_choice and question_answer rows, not to alpaca"
    ):
        load_examples(path, template="direct")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**CHOICE, "answer": 3}, "field `answer` is 3, expected the index of the right choice, 0 to 2"),
        ({**CHOICE, "answer": "B"}, "field `answer` is 'B'"),
        ({**CHOICE, "choices": ["one"]}, "no list of 2 to 26 texts"),
        ({**CHOICE, "choices": ["one", 2]}, "holds something else than texts"),
    ],
)  # fmt: skip
def test_a_choice_that_cannot_be_used_is_named(tmp_path, row, said):
    with pytest.raises(DataError, match=re.escape(said)):
        load_examples(write_jsonl(tmp_path / "rows.jsonl", [row]), format="multiple_choice")


# A row by the fields that the hub documents for MetaMathQA.
METAMATH = {
    "type": "GSM_Rephrased",
    "query": "What is 2 + 3?",
    "original_question": "Add 2 and 3.",
    "response": "2 + 3 = 5.\nThe answer is: 5",
}


def test_a_question_that_asks_for_the_derivation_is_answered_with_all_of_it(tmp_path):
    (made,) = examples(tmp_path, METAMATH, template="step_by_step")
    assert made == Example("Question: What is 2 + 3? Think step by step.\nAnswer:", METAMATH["response"])
    (other,) = examples(tmp_path, {"question": "Q?", "answer": "A\n#### 1"}, template="step_by_step")
    assert other == Example("Question: Q? Think step by step.\nAnswer:", "A\n#### 1")
    (plain,) = examples(tmp_path, METAMATH)
    assert plain == Example(instruction_prompt("What is 2 + 3?"), METAMATH["response"])


@pytest.mark.parametrize("template", ["direct", "step_by_step"])
def test_a_wording_that_does_not_fit_the_rows_is_refused(tmp_path, template):
    row = {"prompt": "2+2=", "completion": "4"}
    with pytest.raises(DataError, match=f"{template} applies to .* rows, not to prompt_completion"):
        examples(tmp_path, row, template=template)


def test_metamath_rows_have_no_direct_answer(tmp_path):
    with pytest.raises(DataError, match="direct applies to multiple_choice and question_answer rows"):
        examples(tmp_path, METAMATH, template="direct")


def test_long_rows_are_left_out_before_they_are_counted(tmp_path):
    rows = [{**METAMATH, "query": "x" * n, "response": "y" * 10} for n in (5, 9, 10, 6)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = load_data(DataSettings(path=path, max_characters=20, limit=2, template="verbatim"))
    assert [len(example.prompt) for example in data.train] == [5, 9]
    data = load_data(DataSettings(path=path, max_characters=20, template="verbatim"))
    assert [len(example.prompt) for example in data.train] == [5, 9, 6]
    assert (data.sources["train"]["rows"], data.sources["train"]["too_long"]) == (3, 1)
    with pytest.raises(DataError, match="all 4 rows have more than 3 characters"):
        load_data(DataSettings(path=path, max_characters=3))


def test_prompts_are_learned_where_the_recipe_says_so_and_never_of_conversations(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [METAMATH] * 4)
    data = load_data(DataSettings(path=path, learn_prompt=True, held_out_fraction=0.25))
    assert all(example.learn_prompt for example in [*data.train, *data.held_out])
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path = write_jsonl(tmp_path / "chats.jsonl", [{"messages": messages}] * 2)
    for setting in ({"learn_prompt": True}, {"max_characters": 10}):
        with pytest.raises(DataError, match="does not apply to conversations"):
            load_data(DataSettings(path=path, **setting))
