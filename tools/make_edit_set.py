"""Write the built-in set of edits and the unrelated questions from the facts in tools/edit_facts.

    python -m tools.make_edit_set [--check]

The facts are stated by this project. A subject is either edited or asked about, never both; which of the two follows
from its name alone. `new` is another answer to the same question, about another subject. The same facts give the same
files, byte for byte; --check writes nothing and leaves with 1 where the files differ.
"""

import json
import random
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FACTS = ROOT / "tools" / "edit_facts"
EDITS = ROOT / "src" / "hiplora" / "editing" / "data" / "editset.jsonl"
QUESTIONS = ROOT / "src" / "hiplora" / "editing" / "data" / "locality.jsonl"
SEED = 42
ASKED = 19  # of 100 subjects, how many are asked about rather than edited


class Relation(NamedTuple):
    """A column of a table of facts, and how one asks for it: to edit, in other words, and of subjects not edited.

    {s} is the subject, {S} the same with a capital, any other name a column. `within` names a column in which the
    subjects that swap answers must agree.
    """

    table: str
    answer: str
    category: str
    prompt: str
    paraphrase: str
    asked: str
    within: str


# Everyday questions, far from the edits: table, answer, how one asks.
EVERYDAY = (
    ("opposites", "opposite", "The opposite of {s} is"),
    ("plurals", "plural", "One says one {s}, but many"),
    ("pasts", "past", "Today I {s}, yesterday I"),
    ("french", "french", 'The French word for "{s}" is'),
    ("kinds", "kind", "{S} is a kind of"),
    ("colours", "colour", "The colour of {s} is"),
    ("uses", "use", "The word that goes with {s} is"),
    ("words", "answer", "{prompt}"),
)
SUMS = tuple((a, b) for a in range(2, 9) for b in range(a, 9))

Row = dict[str, str]


def table(name: str) -> list[Row]:
    """Read a table of facts: a line of column names, then a fact a line; the first column is the subject."""
    first, *lines = (FACTS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    columns = first.split("|")
    rows = [dict(zip(columns, line.split("|"), strict=True)) for line in lines if line]
    subject = "subject" if "subject" in columns else columns[0]
    return [{**row, "s": row[subject], "S": row[subject][:1].upper() + row[subject][1:]} for row in rows]


def relations() -> list[Relation]:
    """Read how one asks for each kind of fact."""
    lines = (FACTS / "relations.txt").read_text(encoding="utf-8").splitlines()
    return [Relation(*line.split("|")) for line in lines[1:]]


def is_asked(subject: str) -> bool:
    """Whether a subject is asked about, and its facts never edited."""
    return zlib.crc32(subject.casefold().encode()) % 100 < ASKED


def edits() -> list[Row]:
    """Return the edits, the categories mixed."""
    rows = [edit for relation in relations() for edit in _edits_of(relation)]
    random.Random(SEED).shuffle(rows)
    return rows


def questions() -> list[Row]:
    """Return the unrelated questions with their true answers, the kinds mixed."""
    rows = [
        {"prompt": relation.asked.format(**fact), "answer": fact[relation.answer], "subject": fact["s"]}
        for relation in relations()
        for fact in table(relation.table)
        if fact[relation.answer] and is_asked(fact["s"])
    ]
    for name, answer, wording in EVERYDAY:
        for fact in table(name):
            rows.append({"prompt": wording.format(**fact), "answer": fact[answer], "subject": fact["s"]})
    rows += [{"prompt": f"{a} + {b} =", "answer": str(a + b), "subject": f"{a} + {b}"} for a, b in SUMS]
    rows = [row for row in rows if not _stands_in(row["answer"], row["prompt"])]
    random.Random(SEED).shuffle(rows)
    return rows


def _edits_of(relation: Relation) -> Iterator[Row]:
    facts = [fact for fact in table(relation.table) if fact[relation.answer]]
    for fact in facts:
        texts = relation.prompt.format(**fact), relation.paraphrase.format(**fact)
        old = fact[relation.answer]
        if is_asked(fact["s"]) or any(_stands_in(old, text) for text in texts):
            continue
        others = [row for row in facts if not relation.within or row[relation.within] == fact[relation.within]]
        pool = sorted({row[relation.answer] for row in others} - {old})
        pool = [new for new in pool if not any(_stands_in(new, text) for text in texts)]
        new = random.Random(f"{SEED} {texts[0]}").choice(pool)
        row = {"set": "editset", "category": relation.category, "subject": fact["s"]}
        yield row | {"prompt": texts[0], "paraphrase": texts[1], "old": old, "new": new}


def _stands_in(answer: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) is not None


def lines(rows: list[Row]) -> str:
    """Write rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> int:
    """Write both files, or check them."""
    made = {EDITS: lines(edits()), QUESTIONS: lines(questions())}
    if "--check" not in sys.argv[1:]:
        for path, text in made.items():
            path.write_text(text, encoding="utf-8")
        return 0
    wrong = [path for path, text in made.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in wrong:
        print(f"{path.relative_to(ROOT)}: differs from the facts; run python -m tools.make_edit_set")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
