"""Data for the smallest study: files with the names and fields of the published ones, made here from lists of words.

Training and test rows are questions of the same kinds and never the same questions. They are short, and a model as
small as `pico` can learn from them; what it scores says nothing about the published benchmarks.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hiplora.files import write_atomic
from hiplora.study import pico_words as words

Row = dict[str, Any]
TRAIN_ROWS, TEST_ROWS = 64, 16
EDITS_PER_RELATION = 8  # of the 20 subjects of a relation; the others are the neighbours
ARTICLES, ARTICLE_SENTENCES = 4, 24


def write_pico_data(folder: Path) -> list[Path]:
    """Write the files that a study of the paper's four domains reads, and return their paths.

    Training rows: `alpaca`, `scienceqa_train`, `gsm8k_train`, `codealpaca`; test rows: `mmlu_test`, `scienceqa_test`,
    `gsm8k_test`, `humaneval`; edits: `counterfact`; text: `wikitext2_raw_valid`, `wikitext2_raw_train_head`; each
    with the suffix `.jsonl`. The bytes are the same each time. Each file appears whole, so that
    several processes may write at once.

    Raises:
        OSError: the folder cannot be written.
    """
    return [write_atomic(Path(folder) / f"{name}.jsonl", _lines(rows)) for name, rows in _files()]


def _files() -> Iterator[tuple[str, Iterable[Row]]]:
    kinds, kinds_test = _distinct("kinds", _kind)
    yield "alpaca", map(_alpaca, kinds)
    yield "mmlu_test", kinds_test
    science, science_test = _distinct("science", _science)
    yield "scienceqa_train", [{**row, "id": str(n), "split": "train"} for n, row in enumerate(science)]
    yield "scienceqa_test", [{**row, "id": str(n), "split": "test"} for n, row in enumerate(science_test)]
    sums, sums_test = _distinct("sums", _sum)
    yield "gsm8k_train", sums
    yield "gsm8k_test", sums_test
    problems, problems_test = _distinct("problems", _problem)
    yield "codealpaca", [_codealpaca(row, whole=n % 2 == 0) for n, row in enumerate(problems)]
    yield "humaneval", [_humaneval(f"HumanEval/{n}", row) for n, row in enumerate(problems_test)]
    yield "counterfact", [{**row, "id": f"counterfact-{n}"} for n, row in enumerate(_edits())]
    yield "wikitext2_raw_valid", _articles(words.PLACES[:ARTICLES])
    yield "wikitext2_raw_train_head", _articles(words.PLACES[ARTICLES:])


def _lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)


def _distinct(seed: str, draw: Callable[[random.Random], Row]) -> tuple[list[Row], list[Row]]:
    """Draw training and test rows, no question twice, not even with its choices in another order.

    A text seeds Python's generator in the same way in every process.
    """
    chance, found = random.Random(seed), dict[tuple[str, ...], Row]()
    while len(found) < TRAIN_ROWS + TEST_ROWS:
        row = draw(chance)
        found.setdefault((row["question"], *sorted(row.get("choices", ()))), row)
    rows = list(found.values())
    return rows[:TRAIN_ROWS], rows[TRAIN_ROWS:]


def _kind(chance: random.Random) -> Row:
    """A multiple-choice question for a word of a kind, in MMLU's fields."""
    kind, *others = chance.sample(list(words.KINDS), 4)
    subject, group, _ = words.KINDS[kind]
    choices, answer = _shuffled(chance, [chance.choice(words.KINDS[name][2]) for name in (kind, *others)])
    question = f"Which of these words names {kind}?"
    return {"question": question, "choices": choices, "answer": answer, "subject": subject, "group": group}


def _alpaca(row: Row) -> Row:
    """The same question as an instruction, answered with the word."""
    return {
        "instruction": row["question"],
        "input": ", ".join(row["choices"]),
        "output": row["choices"][row["answer"]],
        "source": "pico",
    }


def _science(chance: random.Random) -> Row:
    """A question on states of matter or on the alphabet, in ScienceQA's fields."""
    if chance.random() < 0.2:
        pair = chance.sample([word for _, _, group in words.KINDS.values() for word in group], 2)
        choices, answer = _shuffled(chance, sorted(pair))
        return {"question": "Which word comes first in the alphabet?", "choices": choices, "answer": answer}
    states = chance.sample(list(words.STATES), chance.choice((2, 3)))
    choices, answer = _shuffled(chance, [chance.choice(words.STATES[state]) for state in states])
    return {"question": f"Which of these is {states[0]}?", "choices": choices, "answer": answer}


def _shuffled(chance: random.Random, choices: Sequence[str]) -> tuple[list[str], int]:
    """Return the choices in another order, and where the first of them is now."""
    mixed = chance.sample(choices, len(choices))
    return mixed, mixed.index(choices[0])


def _sum(chance: random.Random) -> Row:
    """A sum or difference in words, in GSM8K's fields, the calculation between `<<` and `>>`."""
    name, things = chance.choice(words.NAMES), chance.choice(words.THINGS)
    first, second = chance.randint(1, 9), chance.randint(1, 9)
    if chance.random() < 0.5:
        change, sign, result = f"buys {second} more", "+", first + second
    else:
        first, second = max(first, second), min(first, second)
        change, sign, result = f"gives away {second}", "-", first - second
    return {
        "question": f"{name} has {first} {things} and {change}. How many {things} does {name} have now?",
        "answer": f"{name} has {first} {sign} {second} = <<{first}{sign}{second}={result}>>{result} {things}.\n"
        f"#### {result}",
    }


# What a function is called, what it returns in words and in Python, and its argument; `n` is drawn.
_FUNCTIONS: tuple[tuple[str, str, str, str, Callable[[Any, int], Any]], ...] = (
    ("plus", "the number plus {n}", "number + {n}", "number", lambda number, n: number + n),
    ("minus", "the number minus {n}", "number - {n}", "number", lambda number, n: number - n),
    ("times", "the number times {n}", "number * {n}", "number", lambda number, n: number * n),
    ("first", "the first {n} letters of the text", "text[:{n}]", "text", lambda text, n: text[:n]),
    ("last", "the last {n} letters of the text", "text[-{n}:]", "text", lambda text, n: text[-n:]),
    ("repeat", "the text {n} times", "text * {n}", "text", lambda text, n: text * n),
    (
        "longer",
        "whether the text has more than {n} letters",
        "len(text) > {n}",
        "text",
        lambda t, n: len(t) > n,
    ),
)
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "number": (0, 3, -7, 12),
    "text": ("", "river", "harbour town", "the old stone bridge"),
}


def _problem(chance: random.Random) -> Row:
    """A function of one line: what it returns in words, its head, its body, and its results for some arguments."""
    name, says, code, argument, function = chance.choice(_FUNCTIONS)
    n = chance.randint(2, 15)
    return {
        "name": f"{name}_{n}",
        "question": says.format(n=n),
        "head": f'def {name}_{n}({argument}):\n    """Return {says.format(n=n)}."""\n',
        "body": f"    return {code.format(n=n)}\n",
        "checks": [(value, function(value, n)) for value in _ARGUMENTS[argument]],
    }


def _codealpaca(row: Row, whole: bool) -> Row:
    """The function to write from its description, or to complete from its head."""
    if whole:
        return {
            "instruction": f"Write a Python function that returns {row['question']}.",
            "input": "",
            "output": row["head"] + row["body"],
            "source": "pico",
        }
    return {
        "instruction": "Complete the function.",
        "input": row["head"],
        "output": row["body"],
        "source": "pico",
    }


def _humaneval(task_id: str, row: Row) -> Row:
    checks = "".join(f"    assert candidate({value!r}) == {result!r}\n" for value, result in row["checks"])
    return {
        "task_id": task_id,
        "prompt": row["head"],
        "entry_point": row["name"],
        "canonical_solution": row["body"],
        "test": f"\n\ndef check(candidate):\n{checks}\n",
    }


def _edits() -> Iterator[Row]:
    """Edits in CounterFact's fields; the neighbours are subjects that no edit is about, with the same true answer."""
    for relation, prompt, paraphrase, subjects, answers in words.FACTS:
        for place, subject in enumerate(subjects[:EDITS_PER_RELATION]):
            true = place % len(answers)
            neighbours = subjects[EDITS_PER_RELATION:][true :: len(answers)]
            yield {
                "subject": subject,
                "relation": relation,
                "relation_from": "stated",
                "prompt": prompt.format(subject=subject),
                "paraphrase_prompts": [paraphrase.format(subject=subject)],
                "target_true": answers[true],
                "target_new": answers[(true + 1 + place // len(answers)) % len(answers)],
                "neighborhood_prompts": [prompt.format(subject=other) for other in neighbours],
                "neighborhood_answers": [answers[true]] * len(neighbours),
            }


def _articles(places: Sequence[str]) -> Iterator[Row]:
    """Articles on towns, spaced as WikiText is; which sentences an article has depends on its title alone."""
    for index, place in enumerate(places):
        chance = random.Random(place)
        sentences = (_sentence(chance, place) for _ in range(ARTICLE_SENTENCES))
        yield {"index": index, "title": place, "text": f" \n = {place} = \n \n {' '.join(sentences)} \n"}


def _sentence(chance: random.Random, place: str) -> str:
    goods, more = chance.sample(words.GOODS, 2)
    return chance.choice(words.SENTENCES).format(
        place=place,
        other=chance.choice([other for other in words.PLACES if other != place]),
        name=chance.choice(words.NAMES),
        building=chance.choice(words.BUILDINGS),
        adjective=chance.choice(words.ADJECTIVES),
        goods=goods,
        more=more,
        time=chance.choice(words.TIMES),
        year=chance.randint(1600, 1990),
        number=chance.randint(2, 90),
    )
