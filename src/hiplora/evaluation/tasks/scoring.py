"""Scores that lm-eval lacks; the task files name them with `!function`."""

import json
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from hiplora.data.prompts import final_number, normal_number

# What a derivation says before its answer; the first of these in the text counts.
MARKS = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")
Row = Mapping[str, Any]


def number_match(row: Row, results: Sequence[str]) -> dict[str, float]:
    """Exact match of a direct numerical answer, both sides in their plain form (`normal_number`)."""
    return {"exact_match": float(normal_number(results[0]) == final_number(row))}


def stated_match(row: Row, results: Sequence[str]) -> dict[str, float]:
    """Whether a derivation states the answer that the solution states (`stated_answer`)."""
    answer = stated_answer(results[0])
    return {"exact_match": float(answer is not None and answer == stated_answer(str(row["answer"])))}


def stated_answer(text: str) -> float | str | None:
    """Return the answer that a derivation states, as a number if it is one (or a fraction); None if it states none.

    It is what follows the last mark, up to the end of the line, without punctuation, currency and per-cent signs
    around it. A number with commas between its digits counts as text, as in the source: PEFT's comparison of methods
    (github.com/huggingface/peft, method_comparison/MetaMathQA/utils.py at 0134244).
    """
    text = text.strip().rstrip(".!?")
    mark = next((mark for mark in MARKS if mark in text), None)
    if mark is None:
        return None
    line = text.rpartition(mark)[2].strip().partition("\n")[0].strip(" .!?$%")
    above, slash, below = line.partition("/")
    try:
        number = Decimal(above.strip())
        return float(number / Decimal(below.strip()) if slash else number)
    except (ArithmeticError, ValueError):
        return line


def humaneval(row: Row, results: Sequence[Sequence[str]]) -> dict[str, float]:
    """pass@k of the sampled completions of a HumanEval problem, for each k of 1, 5, 10 up to the number of samples."""
    test = f"\n{row['test']}\ncheck({row['entry_point']})\n"
    return _passed([f"{row['prompt']}{completion}{test}" for completion in results[0]])


def mbpp(row: Row, results: Sequence[Sequence[str]]) -> dict[str, float]:
    """pass@k of the sampled solutions of an MBPP problem."""
    tests = row["test_list"]
    tests = json.loads(tests) if isinstance(tests, str) else tests
    checks = "\n".join([row["test_setup_code"], *tests])
    return _passed([f"{completion}\n{checks}\n" for completion in results[0]])


def _passed(programs: Sequence[str]) -> dict[str, float]:
    from hiplora.evaluation.sandbox import run_program
    from hiplora.metrics import pass_at_k

    passed = sum(run_program(program).passed for program in programs)
    return {f"pass@{k}": pass_at_k(len(programs), passed, k) for k in (1, 5, 10) if k <= len(programs)}
