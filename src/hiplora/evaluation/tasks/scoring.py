"""What lm-eval calls to score a response where none of its own metrics does."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hiplora.evaluation.tasks.wording import final_number, normal_number, stated_answer


def number_match(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Exact match of a direct numerical answer, both sides in their plain form (`normal_number`)."""
    return {"exact_match": float(normal_number(results[0]) == final_number(row))}


def stated_match(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether a derivation states the answer that the solution states (`stated_answer`)."""
    found = stated_answer(results[0])
    return {"exact_match": float(found is not None and found == stated_answer(str(row["answer"])))}


def all_responses(responses: Sequence[Sequence[str]], rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The filter that hands every sampled response of a row on, and not only the first."""
    return [list(sampled) for sampled in responses]


def humaneval(row: Mapping[str, Any], results: Sequence[Sequence[str]]) -> dict[str, float]:
    """pass@k of the sampled completions of a HumanEval problem, for k = 1, 5, 10 as far as there are samples."""
    programs = [
        f"{row['prompt']}{completion}\n{row['test']}\ncheck({row['entry_point']})\n"
        for completion in results[0]
    ]
    return _passed(programs)


def mbpp(row: Mapping[str, Any], results: Sequence[Sequence[str]]) -> dict[str, float]:
    """pass@k of the sampled solutions of an MBPP problem."""
    checks = "\n".join([row["test_setup_code"], *_lines(row["test_list"])])
    return _passed([f"{completion}\n{checks}\n" for completion in results[0]])


def _lines(value: Any) -> list[str]:
    return json.loads(value) if isinstance(value, str) else list(value)


def _passed(programs: Sequence[str]) -> dict[str, float]:
    from hiplora.evaluation.sandbox import run_programs
    from hiplora.metrics import pass_at_k

    passed = sum(outcome.status == "passed" for outcome in run_programs(programs))
    return {f"pass@{k}": pass_at_k(len(programs), passed, k) for k in (1, 5, 10) if k <= len(programs)}
