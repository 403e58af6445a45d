import gzip
import json

import pytest

from hiplora.editing import load_counterfact, load_edits
from hiplora.editing.counterfact import RELATION_CATEGORIES
from hiplora.editing.edits import CATEGORIES
from hiplora.errors import ConfigError, DataError
from tests.tiny import write_jsonl

ROW = {
    "prompt": "The sea around Skye is the",
    "subject": "Skye",
    "target_true": "Minch",
    "target_new": "Baltic",
    "relation": "P276",
    "paraphrase_prompts": ["Boats to Skye cross the", "From Skye one sees the"],
    "neighborhood_prompts": ["The sea around Lewis is the", "The sea around Rona is the"],
    "neighborhood_answers": ["Minch", "Minch"],
}
OWN = {
    "set": "one",
    "category": "Relation/Fact",
    "subject": "tea",
    "prompt": "Tea is drunk from a",
    "paraphrase": "What holds tea is a",
    "old": "cup",
    "new": "bowl",
}


def rows(*changes):
    return [{**ROW, "prompt": f"{ROW['prompt']} {i}", **change} for i, change in enumerate(changes)]


def test_a_row_becomes_an_edit_with_its_category_paraphrase_and_neighbours(tmp_path):
    (edit,) = load_counterfact(write_jsonl(tmp_path / "counterfact.jsonl", [ROW])).edits
    assert (edit.prompt, edit.old, edit.new, edit.subject) == (ROW["prompt"], "Minch", "Baltic", "Skye")
    assert edit.category == "Relation/Fact"
    assert edit.paraphrase == "Boats to Skye cross the"
    assert [(near.prompt, near.answer) for near in edit.neighbours] == [
        ("The sea around Lewis is the", "Minch"),
        ("The sea around Rona is the", "Minch"),
    ]


def test_edits_come_in_the_order_of_the_file_and_limits_take_the_first(tmp_path):
    file = write_jsonl(tmp_path / "x.jsonl", rows({}, {}, {}))
    part = load_counterfact(file, 2, neighbours=1)
    assert [edit.prompt[-1] for edit in part.edits] == ["0", "1"]
    assert [len(edit.neighbours) for edit in part.edits] == [1, 1]
    assert part.name == "x"


def test_gzipped_files_are_read(tmp_path):
    file = tmp_path / "counterfact.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps(ROW).encode()))
    assert len(load_counterfact(file)) == 1
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        load_counterfact(file)


def test_rows_that_change_nothing_or_repeat_a_prompt_are_left_out(tmp_path):
    again = {"prompt": f"{ROW['prompt']} 0", "target_new": "Arctic"}
    file = write_jsonl(tmp_path / "x.jsonl", rows({}, {"target_new": "Minch"}, again, {}))
    assert [(edit.prompt[-1], edit.new) for edit in load_counterfact(file).edits] == [
        ("0", "Baltic"),
        ("3", "Baltic"),
    ]


def test_without_a_relation_answers_with_digits_are_numeric(tmp_path):
    unlabelled = {"relation": "unlabelled"}
    file = write_jsonl(
        tmp_path / "zsre.jsonl", rows(unlabelled, {**unlabelled, "target_true": "1987", "target_new": "1997"})
    )
    assert [edit.category for edit in load_edits(file).edits] == ["Relation/Fact", "Temporal/Numeric"]


def test_the_table_names_categories_of_the_paper():
    assert set(RELATION_CATEGORIES.values()) < set(CATEGORIES)
    assert RELATION_CATEGORIES["P103"] == "Entity/Attribute"
    assert RELATION_CATEGORIES["P36"] == "Relation/Fact"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"relation": "P9999"}, "relation is 'P9999'; expected one of P30"),
        ({"target_new": " "}, "target_new is ' '"),
        ({"paraphrase_prompts": []}, "paraphrase_prompts is empty"),
        ({"neighborhood_answers": ["Minch"]}, "2 neighborhood_prompts and 1 neighborhood_answers"),
        ({"neighborhood_prompts": "one"}, "neighborhood_prompts is 'one'; expected a list of texts"),
    ],
)
def test_a_row_that_is_no_edit_is_named_with_its_line(tmp_path, change, said):
    file = write_jsonl(tmp_path / "cf.jsonl", rows({}, change))
    with pytest.raises(DataError, match=rf"cf\.jsonl, line 2: {said}"):
        load_counterfact(file)


def test_a_file_with_fewer_edits_than_asked_for_is_an_error(tmp_path):
    file = write_jsonl(tmp_path / "x.jsonl", rows({}, {}))
    with pytest.raises(DataError, match="has 2 edits, 3 are asked for"):
        load_edits(file, 3)
    with pytest.raises(ConfigError, match="limit is 0"):
        load_counterfact(file, 0)


def test_edits_are_told_apart_by_their_form(tmp_path):
    own = write_jsonl(tmp_path / "own.jsonl", [OWN])
    theirs = write_jsonl(tmp_path / "theirs.jsonl", [ROW])
    assert load_edits(own).edits[0].new == "bowl"
    assert load_edits(theirs).edits[0].new == "Baltic"
    assert len(load_edits("builtin", 7)) == 7
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="has no edits"):
        load_edits(tmp_path / "empty.jsonl")


def test_edits_of_one_category_are_taken_and_the_limit_counts_them(tmp_path):
    for category in CATEGORIES:
        found = load_edits("builtin", 40, category=category)
        assert {edit.category for edit in found.edits} == {category}
        whole = [edit for edit in load_edits("builtin").edits if edit.category == category]
        assert list(found.edits) == whole[:40]
    with pytest.raises(ConfigError, match="category is 'Colours'; expected one of Entity/Attribute"):
        load_edits("builtin", category="Colours")
    path = write_jsonl(tmp_path / "edits.jsonl", rows({"relation": "P19"}))
    with pytest.raises(DataError, match="of the category Temporal/Numeric: has no edits"):
        load_edits(path, category="Temporal/Numeric")
