"""Success and locality: likelihoods by hand, matches of whole words, and the frozen reference."""

from dataclasses import replace

import pytest

from hiplora.editing import Edit, evaluate_edits, measure
from hiplora.evaluation.answers import continuations
from tests.reference import answer_log_prob
from tests.tiny import tiny_tokenizer
from tests.unit.editing.samples import EDITS, QUESTIONS, writer

TOKENIZER = tiny_tokenizer()


@pytest.mark.parametrize("paraphrase", [False, True])
def test_likelihoods_equal_the_token_by_token_ones_and_the_greedy_text_has_room_for_every_answer(paraphrase):
    model = writer()
    edits = [EDITS[0], replace(EDITS[1], new="eight", prompt="One and one and one make")]
    records = evaluate_edits(model, TOKENIZER, edits, paraphrase=paraphrase)
    prompts = [edit.paraphrase if paraphrase else edit.prompt for edit in edits]
    assert records["written"].tolist() == continuations(model, TOKENIZER, prompts, 9)  # " eight", and 3 more
    for edit, prompt, row in zip(edits, prompts, records.itertuples(), strict=True):
        new, old = (answer_log_prob(model, TOKENIZER, prompt, f" {answer}") for answer in (edit.new, edit.old))
        assert (row.log_prob_new, row.log_prob_old) == pytest.approx((new, old), abs=1e-4)
        assert (row.preferred, row.success) == (new > old, new > old or row.exact)


def test_an_exact_match_is_of_whole_words_at_the_beginning_whatever_their_form():
    written = [" Green.", " the green one", " GREEN\n", " greenish", " not green", ""]
    assert measure._begins_with(written, ["green"] * 6).tolist() == [1, 1, 1, 0, 0, 0]
    assert measure.normalise("  The  White-House, D.C. ") == "white house d c"
    numbers = {"1,500 m": "1", "3.5.": "3", "-3": "3", "-3 m": "-3", "1990-91": "1990"}
    assert measure._begins_with(list(numbers), list(numbers.values())).tolist() == [0, 0, 0, 1, 1]
    assert measure.normalise("Ａ") == ""  # a full-width article
    assert measure.normalise("under_score Thebes") == "under score thebes"


def test_neighbours_are_kept_if_their_answer_is_likelier_than_the_new_one_and_shares_are_per_cent():
    model = writer()
    records = measure.measure_edits(model, TOKENIZER, {4: EDITS[0], 7: EDITS[1]})
    near, new = EDITS[1].neighbours[0], EDITS[1].new
    true, wrong = measure.answer_log_probs(model, TOKENIZER, [(near.prompt, near.answer), (near.prompt, new)])
    assert records["index"].tolist() == [4, 7]
    assert records["neighbours_kept"].tolist() == [[], [int(true > wrong)]]
    records["preferred"] = [1, 0]
    summary = measure.summarise(records)
    assert list(summary) == ["all", EDITS[0].category, EDITS[1].category]
    assert [summary[name]["preferred"] for name in summary] == [50, 100, 0]
    assert summary["all"]["neighbours_kept"] == 100 * (true > wrong)
    assert "neighbours_kept" not in summary[EDITS[0].category]


def test_the_bare_base_shows_no_change_elsewhere():
    model = writer()
    targets = measure.unrelated_targets(QUESTIONS, EDITS)
    assert targets == ["blue", "pink", "grey"]
    before = measure.ask(model, TOKENIZER, QUESTIONS, targets)
    prompts = [item.prompt for item in QUESTIONS]
    assert before["written"].tolist() == continuations(model, TOKENIZER, prompts, 8)  # " roof" and 3 more
    for column, answers in (("log_prob", [item.answer for item in QUESTIONS]), ("edited_log_prob", targets)):
        pairs = list(zip(prompts, answers, strict=True))
        assert before[column].tolist() == pytest.approx(measure.answer_log_probs(model, TOKENIZER, pairs))
    summary = measure.summarise_locality(before, measure.ask(model, TOKENIZER, QUESTIONS, targets))
    assert summary["unchanged"] == 100
    assert summary["accuracy_change"] == summary["log_prob_change"] == summary["edited_log_prob_change"] == 0
    assert measure.summarise_locality(before.assign(correct=[1, 1, 0]), before)["accuracy_change"] == pytest.approx(
        -200 / 3
    )


def test_an_edit_without_an_old_answer_is_compared_with_what_the_base_writes_and_may_lack_a_paraphrase(monkeypatch):
    model, bare = writer(), Edit("Thing 0 is", "", "blue")
    with monkeypatch.context() as patch:
        patch.setattr("hiplora.editing.measure.continuations", lambda *args: [" cyan and\nmore"])
        first, second = measure.with_old_answers(model, TOKENIZER, [bare, EDITS[1]])
    assert (first.old, second) == ("cyan", EDITS[1])  # as long as " blue"
    records = measure.measure_edits(model, TOKENIZER, {0: first, 1: second})
    assert records["paraphrase_success"].isna().tolist() == [True, False]
    assert measure.summarise(records)["all"]["paraphrase_success"] == 100 * records["paraphrase_success"][1]
