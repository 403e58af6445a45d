import json
from collections import Counter

import pytest

from hiplora.editing import load_edit_sets
from hiplora.errors import DataError
from tests.tiny import write_jsonl

GOOD = {
    "set": "one",
    "category": "Relation/Fact",
    "subject": "tea",
    "prompt": "Tea is drunk from a",
    "paraphrase": "What holds tea is a",
    "old": "cup",
    "new": "bowl",
}


def test_the_built_in_edits_are_two_sets_of_sixteen_with_every_category_in_both():
    sets = load_edit_sets()
    assert [(part.name, len(part)) for part in sets] == [("places", 16), ("knowledge", 16)]
    for part in sets:
        assert min(Counter(edit.category for edit in part.edits).values()) >= 4
        assert len({edit.category for edit in part.edits}) == 3


def test_no_built_in_prompt_gives_an_answer_away_or_stands_twice():
    edits = [edit for part in load_edit_sets() for edit in part.edits]
    prompts = [text for edit in edits for text in (edit.prompt, edit.paraphrase)]
    assert len(set(prompts)) == 64
    for edit in edits:
        for prompt in (edit.prompt, edit.paraphrase):
            assert edit.old not in prompt
            assert edit.new not in prompt
    answers = Counter(edit.new for edit in edits)
    assert max(answers.values()) <= 2  # no single token to learn instead of the facts


@pytest.mark.real_model
def test_the_real_model_prefers_every_old_answer_of_the_built_in_edits(smollm2):
    from hiplora.editing import evaluate_edits
    from hiplora.models import load

    model, tokenizer = load(str(smollm2))
    for part in load_edit_sets():
        assert not any(outcome.preferred for outcome in evaluate_edits(model, tokenizer, part.edits))


def test_a_file_of_edits_is_read_in_the_order_of_its_sets(tmp_path):
    rows = [{**GOOD, "set": name, "prompt": f"{i} is"} for i, name in enumerate(("b", "a", "b"))]
    sets = load_edit_sets(write_jsonl(tmp_path / "edits.jsonl", rows))
    assert [(part.name, [edit.prompt for edit in part.edits]) for part in sets] == [
        ("b", ["0 is", "2 is"]),
        ("a", ["1 is"]),
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"new": "cup"}, "old and new are both 'cup'"),
        ({"category": "Other"}, "category is 'Other'; expected one of Entity/Attribute"),
        ({"prompt": " "}, "prompt is ' '"),
        ({"new": " bowl"}, "new is ' bowl'.*no outer spaces"),
        ({"old": 3}, "old is 3; expected text"),
        ({"extra": 1}, "expected exactly the fields .*found .*extra"),
    ],
)
def test_a_row_that_is_no_edit_is_named_with_its_line(tmp_path, change, said):
    file = write_jsonl(tmp_path / "edits.jsonl", [GOOD, {**GOOD, "prompt": "Another is", **change}])
    with pytest.raises(DataError, match=rf"edits\.jsonl, line 2: {said}"):
        load_edit_sets(file)


def test_a_prompt_that_stands_twice_is_an_error(tmp_path):
    file = write_jsonl(tmp_path / "edits.jsonl", [GOOD, {**GOOD, "new": "glass"}])
    with pytest.raises(DataError, match=r"line 2: prompt 'Tea is drunk from a' stands in line 1 already"):
        load_edit_sets(file)


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "has no edits"), ("{}\n", "expected exactly"), ("[1]\n", "found list"), ("{\n", "not JSON")],
)
def test_a_file_that_holds_no_edits_is_an_error(tmp_path, text, said):
    file = tmp_path / "edits.jsonl"
    file.write_text(text)
    with pytest.raises(DataError, match=said):
        load_edit_sets(file)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        load_edit_sets(tmp_path / "none.jsonl")


def test_the_built_in_file_is_one_object_a_line_with_sorted_out_spaces():
    for part in load_edit_sets():
        for edit in part.edits:
            assert "  " not in json.dumps(edit.__dict__)
