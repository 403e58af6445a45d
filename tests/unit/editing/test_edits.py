"""Edit sets: the built-in ones, files of the project's format, CounterFact and zsRE."""

import gzip
import json
from collections import Counter

import pytest

from hiplora.editing import CATEGORIES, Edit, load_edits, load_questions
from hiplora.editing.measure import normalise
from hiplora.errors import DataError
from tests.tiny import write_jsonl
from tests.unit.editing.samples import COUNTERFACT
from tools import make_edit_set

OWN = {"set": "one", "category": "Relation/Fact", "subject": "tea", "prompt": "Tea is drunk from a"}
OWN |= {"paraphrase": "What holds tea is a", "old": "cup", "new": "bowl"}


@pytest.fixture
def edits(tmp_path):
    """Read rows as edits; those of CounterFact by what they change, in prompts numbered from 0."""

    def read(*rows, **options):
        if rows and "prompt" not in rows[0]:
            rows = [{**COUNTERFACT, "prompt": f"{COUNTERFACT['prompt']} {i}", **row} for i, row in enumerate(rows)]
        return load_edits(write_jsonl(tmp_path / "x.jsonl", rows), **options)

    return read


def test_the_built_in_set_has_a_thousand_sound_edits_with_every_category_in_any_beginning():
    edits, questions = load_edits(), load_questions()
    assert len(edits) >= 1000
    assert len({item.prompt for item in questions}) == len(questions) >= 500
    assert not {item.subject.casefold() for item in questions} & {edit.subject.casefold() for edit in edits}
    counts = Counter(edit.category for edit in edits)
    assert set(counts) == set(CATEGORIES)
    assert min(counts.values()) >= 300
    assert min(Counter(edit.category for edit in edits[:60]).values()) >= 10
    texts = [text for edit in edits for text in (edit.prompt, edit.paraphrase)]
    assert len(set(texts)) == len(texts)
    for edit in edits:
        assert normalise(edit.old) != normalise(edit.new)
        for text in (edit.prompt, edit.paraphrase):
            assert edit.subject.casefold() in text.casefold()
            assert f" {normalise(edit.new)} " not in f" {normalise(text)} "
    for category in CATEGORIES:
        assert load_edits("builtin", 40, category=category) == [one for one in edits if one.category == category][:40]


def test_the_committed_files_are_what_the_generator_makes_of_the_facts():
    lines = make_edit_set.lines(make_edit_set.edits()), make_edit_set.lines(make_edit_set.questions())
    assert lines == tuple(path.read_text(encoding="utf-8") for path in (make_edit_set.EDITS, make_edit_set.QUESTIONS))


def test_a_file_of_edits_is_read_in_the_order_of_its_sets_and_a_prompt_and_a_new_answer_are_enough(edits):
    own = [{"set": name, "prompt": f"{i} is", "new": new} for i, (name, new) in enumerate(("bx", "ay", "b1"))]
    first, second, third = edits(*own)
    assert [edit.prompt for edit in (first, second, third)] == ["0 is", "2 is", "1 is"]
    assert (first.old, first.paraphrase, first.category) == (None, None, "Relation/Fact")
    assert second.category == "Temporal/Numeric"
    assert edits(*own, limit=2) == [first, second]


def test_a_counterfact_row_becomes_an_edit_with_its_category_paraphrase_and_neighbours(tmp_path):
    path = tmp_path / "counterfact.json.gz"
    path.write_bytes(gzip.compress(json.dumps([COUNTERFACT]).encode()))
    (edit,) = load_edits(path)
    assert (edit.prompt, edit.old, edit.new, edit.subject) == (COUNTERFACT["prompt"], "Minch", "Baltic", "Skye")
    assert edit.category == "Relation/Fact"
    assert edit.paraphrase == "Boats to Skye cross the"
    assert [(near.prompt, near.answer) for near in edit.neighbours] == [
        (prompt, "Minch") for prompt in COUNTERFACT["neighborhood_prompts"]
    ]


def test_of_rows_as_counterfacts_a_new_answer_is_enough_and_those_that_change_nothing_or_repeat_are_left_out(edits):
    again = {"prompt": f"{COUNTERFACT['prompt']} 0", "target_new": "Arctic"}
    assert [edit.prompt[-1] for edit in edits({}, {"target_new": "Minch"}, again, {})] == ["0", "3"]
    bare = {"prompt": "Tea is drunk from a", "target_new": "bowl", "relation": "P9999", "rephrase": "Tea …"}
    assert edits(bare) == [Edit(prompt="Tea is drunk from a", old=None, new="bowl")]
    unlabelled = edits(*({"relation": "unlabelled", "target_new": answer} for answer in ("Baltic", "1997")))
    assert [edit.category for edit in unlabelled] == ["Relation/Fact", "Temporal/Numeric"]


@pytest.mark.parametrize(
    ("row", "change", "said"),
    [
        (OWN, {"new": "cup"}, "old and new are both 'cup'"),
        (OWN, {"category": "Other"}, "category: .*Entity"),
        (OWN, {"extra": 1}, "extra: "),
        (OWN, {"prompt": OWN["prompt"]}, "prompt 'Tea is drunk from a' is in an earlier row"),
        (COUNTERFACT, {"target_new": ""}, "target_new: .*needs prompt, target_new"),
        (COUNTERFACT, {"neighborhood_answers": ["Minch"]}, "2 neighborhood_prompts and 1 neighborhood_answers"),
    ],
)
def test_a_row_that_is_not_an_edit_is_named_with_file_line_and_field(edits, row, change, said):
    with pytest.raises(DataError, match=rf"x\.jsonl, line 2: .*{said}"):
        edits(row, {**row, "prompt": "Another is", **change})


def test_files_and_limits_that_cannot_be_used_are_errors(tmp_path, edits):
    for text, said in (("\n", "has no edits"), ("{\n", "line 1: ")):
        (tmp_path / "x.jsonl").write_text(text)
        with pytest.raises(DataError, match=said):
            load_edits(tmp_path / "x.jsonl")
    with pytest.raises(DataError, match="no such file"):
        load_edits(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="has 2 edits, 3 are asked for"):
        edits({}, {}, limit=3)
    with pytest.raises(DataError, match="has 0 edits of the category Temporal/Numeric"):
        edits({}, category="Temporal/Numeric")
