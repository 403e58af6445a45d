import pytest

from hiplora.evaluation.tasks import wording
from hiplora.evaluation.tasks.scoring import number_match, stated_match


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (" 42", "42"),
        ("$1,234.50 in all", "1234.5"),
        ("18.00", "18"),
        ("-7", "-7"),
        ("The answer is 3.", "3"),
        ("007", "7"),
        (".5", "0.5"),
        ("-0", "0"),
        ("none", "none"),
        ("", ""),
    ],
)
def test_numbers_are_compared_in_their_plain_form(text, plain):
    assert wording.normal_number(text) == plain


def test_a_gsm8k_answer_is_what_follows_the_marks():
    row = {"answer": "He pays 2 * 600 = <<2*600=1200>>1200.\n#### 1,200"}
    assert wording.final_number(row) == "1200"
    assert number_match(row, ["$1200.00"]) == {"exact_match": 1.0}
    assert number_match(row, ["1201"]) == {"exact_match": 0.0}
    assert number_match(row, [""]) == {"exact_match": 0.0}


def test_a_plain_number_is_its_own_answer():
    assert wording.final_number({"answer": "3.0"}) == "3"


def test_choices_stand_behind_letters():
    row = {"question": "Which is wet?", "choices": ["sand", "rain"]}
    assert wording.lettered(row) == "Question: Which is wet?\nA. sand\nB. rain\nAnswer:"
    assert wording.letters(row) == ["A", "B"]


def test_a_gap_is_filled_before_what_follows_it():
    row = {"context": "The box hid the key since _ was large.", "choices": ["box", "key"], "answer": 0}
    assert wording.gap_start(row) == ["The box hid the key since box", "The box hid the key since key"]
    assert wording.gap_end(row) == "was large."
    assert wording.gap_answer(row) == 0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 + 3 = 5.\nThe answer is: 5", 5.0),
        ("So x = 5. The answer is 5.", 5.0),
        ("The final answer is: $12.50!\n\nQuestion: next", 12.5),
        ("He pays 1200.\n#### 1200", 1200.0),
        ("The answer is: 1. No, wait. The answer is: 2", 2.0),
        ("The answer is: 50%", 50.0),
        ("The answer is: 20/35", 20 / 35),
        ("The answer is: 1/0", "1/0"),
        ("The answer is: 1/2/3", "1/2/3"),
        ("#### 1,200", "1,200"),
        ("The answer is: x + 1", "x + 1"),
        ("It is 5.", None),
        ("The answer", None),
        ("", None),
    ],
)
def test_the_answer_of_a_derivation_is_what_its_last_mark_announces(text, answer):
    assert wording.stated_answer(text) == answer


def test_a_derivation_is_right_if_it_states_the_solutions_answer():
    row = {"question": "What is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5.\n#### 5"}
    assert wording.step_question(row) == "Question: What is 2 + 3? Think step by step.\nAnswer:"
    assert stated_match(row, ["2 + 3 = 5. The answer is: 5.0"]) == {"exact_match": 1.0}
    assert stated_match(row, ["The answer is: 6"]) == {"exact_match": 0.0}
    assert stated_match(row, ["5"]) == {"exact_match": 0.0}
