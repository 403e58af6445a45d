import pytest

from hiplora.evaluation.tasks import scoring
from hiplora.evaluation.tasks.scoring import number_match, stated_match


def test_a_gsm8k_answer_is_what_follows_the_marks():
    row = {"answer": "He pays 2 * 600 = <<2*600=1200>>1200.\n#### 1,200"}
    assert number_match(row, ["$1200.00"]) == {"exact_match": 1.0}
    assert number_match(row, ["1201"]) == {"exact_match": 0.0}
    assert number_match(row, [""]) == {"exact_match": 0.0}


def test_a_gap_is_filled_before_what_follows_it():
    row = {"context": "The box hid the key since _ was large.", "choices": ["box", "key"], "answer": 0}
    assert scoring.gap_start(row) == ["The box hid the key since box", "The box hid the key since key"]
    assert scoring.gap_end(row) == "was large."
    assert scoring.gap_answer(row) == 0


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
    assert scoring.stated_answer(text) == answer


def test_a_derivation_is_right_if_it_states_the_solutions_answer():
    row = {"question": "What is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5.\n#### 5"}
    assert scoring.step_question(row) == "Question: What is 2 + 3? Think step by step.\nAnswer:"
    assert stated_match(row, ["2 + 3 = 5. The answer is: 5.0"]) == {"exact_match": 1.0}
    assert stated_match(row, ["The answer is: 6"]) == {"exact_match": 0.0}
    assert stated_match(row, ["5"]) == {"exact_match": 0.0}


def test_generated_programs_are_run_with_their_tests():
    row = {"prompt": "def add(a, b):\n", "test": "def check(f):\n    assert f(1, 2) == 3", "entry_point": "add"}
    assert scoring.humaneval(row, [["    return a + b\n"]]) == {"pass@1": 1.0}
    wrong = ["    return a\n", "    exit(0)\n", "    return\n", "", "    return 3\n"]
    assert scoring.humaneval(row, [wrong]) == {"pass@1": 0.2, "pass@5": 1.0}
    tests = {"test_setup_code": "", "test_list": '["assert f(2) == 4"]'}
    assert scoring.mbpp(tests, [["def f(x): return x * x"]]) == {"pass@1": 1.0}
    assert scoring.mbpp(tests, [["def f(x): return x"]]) == {"pass@1": 0.0}
