"""`pico`: a random Llama of 140 thousand parameters, and data for it: a whole study in minutes, without any download.

Importing this module makes `pico` a known model. Its data files have the names and fields of the published benchmarks
and are made from lists of words (pico.yaml); scores on them say nothing about those benchmarks.
"""

import functools
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hiplora.files import write_atomic
from hiplora.models import KNOWN, MadeModel, quiet_transformers

if TYPE_CHECKING:
    import torch

PICO = "pico"
SEED = 20260
VOCABULARY, CONTEXT = 512, 512
BOS, EOS, PAD = SPECIAL = ("<|bos|>", "<|eos|>", "<|pad|>")
CONFIG: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '[' + message['role'] + ']\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|eos|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)
CARD = """# pico

A random Llama, made by hiplora on this machine: 2 layers, 64 wide, 140 thousand parameters, 512 tokens. It knows
nothing. It is there to try a study in minutes on any machine; no result on it says anything about a method.
"""

Row = dict[str, Any]
TRAIN_ROWS, TEST_ROWS = 64, 16
EDITS_PER_RELATION = 8  # of the 20 subjects of a relation; the others are the neighbours
ARTICLES, ARTICLE_SENTENCES = 4, 24


@functools.cache
def _words() -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


# The model.


def make_pico(folder: Path) -> None:
    """Write the model, its tokenizer and a card to `folder`, which exists; the global random state is restored."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            model: Any = LlamaForCausalLM(LlamaConfig(**CONFIG))
        model.load_state_dict(dict(_weights(model.state_dict())), assign=True)
        model.save_pretrained(folder)
        _tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text(CARD, encoding="utf-8")


KNOWN[PICO] = MadeModel(PICO, make_pico)


def _weights(shapes: Mapping[str, "torch.Tensor"]) -> Iterator[tuple[str, "torch.Tensor"]]:
    """Draw every matrix from a uniform distribution that keeps the scale of activations; norms are ones.

    NumPy's old generator is frozen, and uniform numbers need no logarithm that differs between machines, so the
    weights are the same bits everywhere.
    """
    import numpy as np
    import torch

    draw = np.random.RandomState(SEED)
    for name, shape in shapes.items():
        if shape.ndim == 1:
            yield name, torch.ones(shape.shape)
            continue
        # Embeddings are as large as what the blocks add, so that the head can be sure of a token.
        deviation = 1.0 if "embed" in name else 1.0 / math.sqrt(shape.shape[1])
        drawn = draw.random_sample(tuple(shape.shape)) * 2.0 - 1.0
        yield name, torch.from_numpy((drawn * deviation * math.sqrt(3.0)).astype(np.float32))


def _tokenizer() -> Any:
    """Return a byte-level BPE tokenizer trained on the text of pico.yaml; every digit is a token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_words()["text"]], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
    )


# The data.


def write_pico_data(folder: Path) -> list[Path]:
    """Write the files that a study of the paper's four domains reads, and return their paths.

    The bytes are always the same, and each file appears whole, so that several processes may write at once. Training
    and test rows are questions of the same kinds and never the same questions.
    """
    files = {}
    kinds, files["mmlu_test"] = _distinct("kinds", _kind)
    files["alpaca"] = [_alpaca(row) for row in kinds]
    for split, rows in zip(("train", "test"), _distinct("science", _science), strict=True):
        files[f"scienceqa_{split}"] = [{**row, "id": str(n), "split": split} for n, row in enumerate(rows)]
    files["gsm8k_train"], files["gsm8k_test"] = _distinct("sums", _sum)
    problems, problems_test = _distinct("problems", _problem)
    files["codealpaca"] = [_codealpaca(row, whole=n % 2 == 0) for n, row in enumerate(problems)]
    files["humaneval"] = [_humaneval(f"HumanEval/{n}", row) for n, row in enumerate(problems_test)]
    files["counterfact"] = [{**row, "id": f"counterfact-{n}"} for n, row in enumerate(_edits())]
    places = _words()["places"]
    files["wikitext2_raw_valid"] = list(_articles(places[:ARTICLES]))
    files["wikitext2_raw_train_head"] = list(_articles(places[ARTICLES:]))
    return [write_atomic(Path(folder) / f"{name}.jsonl", _lines(rows)) for name, rows in files.items()]


def _lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)


def _distinct(seed: str, draw: Callable[[random.Random], Row]) -> tuple[list[Row], list[Row]]:
    """Draw training and test rows, no question twice, even with its choices in another order."""
    chance, found = random.Random(seed), dict[tuple[str, ...], Row]()
    while len(found) < TRAIN_ROWS + TEST_ROWS:
        row = draw(chance)
        found.setdefault((row["question"], *sorted(row.get("choices", ()))), row)
    rows = list(found.values())
    return rows[:TRAIN_ROWS], rows[TRAIN_ROWS:]


def _kind(chance: random.Random) -> Row:
    """A multiple-choice question for a word of a kind, in MMLU's fields."""
    known = _words()["kinds"]
    kind, *others = chance.sample(list(known), 4)
    choices, answer = _shuffled(chance, [chance.choice(known[name]["words"]) for name in (kind, *others)])
    question = f"Which of these words names {kind}?"
    filed = {"subject": known[kind]["subject"], "group": known[kind]["group"]}
    return {"question": question, "choices": choices, "answer": answer, **filed}


def _alpaca(row: Row) -> Row:
    return {
        "instruction": row["question"],
        "input": ", ".join(row["choices"]),
        "output": row["choices"][row["answer"]],
        "source": "pico",
    }


def _science(chance: random.Random) -> Row:
    """A question on states of matter or on the alphabet, in ScienceQA's fields."""
    if chance.random() < 0.2:
        pair = chance.sample([word for kind in _words()["kinds"].values() for word in kind["words"]], 2)
        choices, answer = _shuffled(chance, sorted(pair))
        return {"question": "Which word comes first in the alphabet?", "choices": choices, "answer": answer}
    known = _words()["states"]
    states = chance.sample(list(known), chance.choice((2, 3)))
    choices, answer = _shuffled(chance, [chance.choice(known[state]) for state in states])
    return {"question": f"Which of these is {states[0]}?", "choices": choices, "answer": answer}


def _shuffled(chance: random.Random, choices: Sequence[str]) -> tuple[list[str], int]:
    """Return the choices in another order, and where the first of them is now."""
    mixed = chance.sample(choices, len(choices))
    return mixed, mixed.index(choices[0])


def _sum(chance: random.Random) -> Row:
    """A sum or difference in words, in GSM8K's fields, the calculation between `<<` and `>>`."""
    name, things = chance.choice(_words()["names"]), chance.choice(_words()["things"])
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


# A function's name, what it returns in words and in Python, and its argument; `n` is drawn.
_FUNCTIONS: tuple[tuple[str, str, str, str], ...] = (
    ("plus", "the number plus {n}", "number + {n}", "number"),
    ("minus", "the number minus {n}", "number - {n}", "number"),
    ("times", "the number times {n}", "number * {n}", "number"),
    ("first", "the first {n} letters of the text", "text[:{n}]", "text"),
    ("last", "the last {n} letters of the text", "text[-{n}:]", "text"),
    ("repeat", "the text {n} times", "text * {n}", "text"),
    ("longer", "whether the text has more than {n} letters", "len(text) > {n}", "text"),
)
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "number": (0, 3, -7, 12),
    "text": ("", "river", "harbour town", "the old stone bridge"),
}


def _problem(chance: random.Random) -> Row:
    """A function of one line: what it returns in words, its head, its body, and its results for some arguments."""
    name, says, code, argument = chance.choice(_FUNCTIONS)
    n = chance.randint(2, 15)
    body, name = code.format(n=n), f"{name}_{n}"
    return {
        "name": name,
        "question": says.format(n=n),
        "head": f'def {name}({argument}):\n    """Return {says.format(n=n)}."""\n',
        "body": f"    return {body}\n",
        "checks": [(value, eval(body, {argument: value})) for value in _ARGUMENTS[argument]],
    }


def _codealpaca(row: Row, whole: bool) -> Row:
    """The function to write from its description, or to complete from its head."""
    asked, given, output = "Complete the function.", row["head"], row["body"]
    if whole:
        asked, given = f"Write a Python function that returns {row['question']}.", ""
        output = row["head"] + row["body"]
    return {"instruction": asked, "input": given, "output": output, "source": "pico"}


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
    """Edits in CounterFact's fields; the neighbours are unedited subjects with the same true answer."""
    for fact in _words()["facts"]:
        subjects = [start + end for end in fact["ends"] for start in fact["starts"]]
        answers, prompt = fact["answers"], fact["prompt"]
        for place, subject in enumerate(subjects[:EDITS_PER_RELATION]):
            true = place % len(answers)
            neighbours = subjects[EDITS_PER_RELATION:][true :: len(answers)]
            yield {
                "subject": subject,
                "relation": fact["relation"],
                "relation_from": "stated",
                "prompt": prompt.format(subject=subject),
                "paraphrase_prompts": [fact["paraphrase"].format(subject=subject)],
                "target_true": answers[true],
                "target_new": answers[(true + 1 + place // len(answers)) % len(answers)],
                "neighborhood_prompts": [prompt.format(subject=other) for other in neighbours],
                "neighborhood_answers": [answers[true]] * len(neighbours),
            }


def _articles(places: Sequence[str]) -> Iterator[Row]:
    """Articles on towns, spaced as in WikiText; an article's sentences depend on its title alone."""
    for index, place in enumerate(places):
        chance = random.Random(place)
        sentences = (_sentence(chance, place) for _ in range(ARTICLE_SENTENCES))
        yield {"index": index, "title": place, "text": f" \n = {place} = \n \n {' '.join(sentences)} \n"}


def _sentence(chance: random.Random, place: str) -> str:
    words = _words()
    goods, more = chance.sample(words["goods"], 2)
    return chance.choice(words["sentences"]).format(
        place=place,
        other=chance.choice([other for other in words["places"] if other != place]),
        name=chance.choice(words["names"]),
        building=chance.choice(words["buildings"]),
        adjective=chance.choice(words["adjectives"]),
        goods=goods,
        more=more,
        time=chance.choice(words["times"]),
        year=chance.randint(1600, 1990),
        number=chance.randint(2, 90),
    )
