from collections import Counter

import pytest

from hiplora.editing import load_edit_set, load_questions
from hiplora.editing.edits import CATEGORIES
from hiplora.editing.success import normalise
from tools import make_edit_set


@pytest.fixture(scope="module")
def edits():
    return load_edit_set().edits


def test_there_are_a_thousand_edits_and_three_hundred_of_each_category(edits):
    assert len(edits) >= 1000
    counts = Counter(edit.category for edit in edits)
    assert set(counts) == set(CATEGORIES)
    assert min(counts.values()) >= 300


def test_the_first_edits_are_a_sample_of_all_categories(edits):
    counts = Counter(edit.category for edit in edits[:60])
    assert min(counts[name] for name in CATEGORIES) >= 10


def test_every_edit_changes_its_answer_to_another_one_of_the_same_kind(edits):
    assert all(normalise(edit.old) != normalise(edit.new) for edit in edits)
    known = {fact[r.answer] for r in make_edit_set.RELATIONS for fact in make_edit_set.table(r.table)}
    assert {edit.new for edit in edits} <= known
    years = [edit for edit in edits if edit.old.isdigit() and len(edit.old) == 4]
    assert len(years) > 200
    assert all(edit.new.isdigit() for edit in years)


def test_prompts_stand_once_name_their_subject_and_do_not_give_an_answer_away(edits):
    texts = [text for edit in edits for text in (edit.prompt, edit.paraphrase)]
    assert len(set(texts)) == len(texts)
    for edit in edits:
        for text in (edit.prompt, edit.paraphrase):
            assert edit.subject.casefold() in text.casefold()
            words = f" {normalise(text)} "
            assert f" {normalise(edit.new)} " not in words
            assert f" {normalise(edit.old)} " not in words


def test_the_unrelated_questions_are_many_differ_and_share_no_subject_with_the_edits(edits):
    questions = load_questions()
    assert len(questions) >= 500
    prompts = {item.prompt for item in questions}
    assert len(prompts) == len(questions)
    assert not prompts & {text for edit in edits for text in (edit.prompt, edit.paraphrase)}
    assert not {item.subject.casefold() for item in questions} & {edit.subject.casefold() for edit in edits}
    assert all(item.subject and item.answer == item.answer.strip() != "" for item in questions)


def test_the_committed_files_are_what_the_generator_makes_of_the_facts():
    made = make_edit_set.lines(make_edit_set.edits()), make_edit_set.lines(make_edit_set.questions())
    found = tuple(path.read_text(encoding="utf-8") for path in (make_edit_set.EDITS, make_edit_set.QUESTIONS))
    assert made == found


def test_no_fact_is_stated_twice():
    for relation in make_edit_set.RELATIONS:
        subjects = [fact["s"] for fact in make_edit_set.table(relation.table)]
        assert len(set(subjects)) == len(subjects), relation.table
