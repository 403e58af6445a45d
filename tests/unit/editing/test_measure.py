"""Success and locality: likelihoods by hand, matches of whole words, and the frozen reference."""

from dataclasses import replace

import pytest
import torch

from hiplora.editing import Edit, evaluate_edits
from hiplora.editing.measure import (
    _right,
    answer_log_probs,
    ask,
    measure_edits,
    normalise,
    summarise,
    summarise_locality,
    unrelated_targets,
    with_old_answers,
)
from hiplora.evaluation.answers import continuations
from tests.tiny import tiny_tokenizer
from tests.unit.editing.samples import EDITS, QUESTIONS, writer


def by_hand(model, tokenizer, prompt, answer):
    """log p(answer | prompt), one token after the other, each from its own forward pass."""
    ids, total = tokenizer(prompt)["input_ids"], 0.0
    for token in tokenizer(answer)["input_ids"]:
        total += model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)[token].item()
        ids = [*ids, token]
    return total


def greedy(model, tokenizer, prompt, count):
    ids = tokenizer(prompt)["input_ids"]
    for _ in range(count):
        ids = [*ids, model(torch.tensor([ids])).logits[0, -1].argmax().item()]
    return tokenizer.decode(ids[-count:], skip_special_tokens=True)


@torch.no_grad()
@pytest.mark.parametrize("paraphrase", [False, True])
def test_likelihoods_and_continuations_equal_the_token_by_token_ones(paraphrase):
    model, tokenizer = writer(), tiny_tokenizer()
    edits = [EDITS[0], replace(EDITS[1], new="eight", prompt="One and one and one make")]
    found = evaluate_edits(model, tokenizer, edits, paraphrase=paraphrase)
    for edit, row in zip(edits, found.itertuples(), strict=True):
        prompt = edit.paraphrase if paraphrase else edit.prompt
        new, old = (by_hand(model, tokenizer, prompt, f" {answer}") for answer in (edit.new, edit.old))
        assert (row.log_prob_new, row.log_prob_old) == pytest.approx((new, old), abs=1e-4)
        assert row.written == greedy(model, tokenizer, prompt, 9)  # " eight", longest of all, and 3 more
        assert (row.preferred, row.success) == (new > old, new > old or row.exact)


def test_an_exact_match_is_of_whole_words_at_the_beginning():
    written = [" Green.", " the green one", " GREEN\n", " greenish", " not green", ""]
    assert _right(written, ["green"] * 6).tolist() == [1, 1, 1, 0, 0, 0]


def test_normalising_drops_case_punctuation_spaces_and_a_leading_article():
    assert normalise("  The  White-House, D.C. ") == "white house d c"
    assert normalise("Ａ") == ""  # a full-width article
    assert normalise("under_score") == "under score"
    assert normalise("Thebes") == "thebes"


def test_neighbours_are_kept_if_their_answer_is_likelier_than_the_new_one_and_shares_are_per_cent():
    model, tokenizer = writer(), tiny_tokenizer()
    records = measure_edits(model, tokenizer, {4: EDITS[0], 7: EDITS[1]})
    near, new = EDITS[1].neighbours[0], EDITS[1].new
    true, wrong = answer_log_probs(model, tokenizer, [(near.prompt, near.answer), (near.prompt, new)])
    assert records["index"].tolist() == [4, 7]
    assert records["neighbours_kept"].tolist() == [[], [int(true > wrong)]]
    records["preferred"] = [1, 0]
    found = summarise(records)
    assert list(found) == ["all", EDITS[0].category, EDITS[1].category]
    assert [found[name]["preferred"] for name in found] == [50, 100, 0]
    assert found["all"]["neighbours_kept"] == 100 * (true > wrong)
    assert "neighbours_kept" not in found[EDITS[0].category]


def test_the_bare_base_shows_no_change_elsewhere():
    model, tokenizer = writer(), tiny_tokenizer()
    targets = unrelated_targets(QUESTIONS, EDITS)
    assert targets == ["blue", "pink", "grey"]
    before = ask(model, tokenizer, QUESTIONS, targets)
    prompts = [item.prompt for item in QUESTIONS]
    assert before["written"].tolist() == continuations(model, tokenizer, prompts, 8)  # " roof" and 3 more
    for column, answers in (("log_prob", [item.answer for item in QUESTIONS]), ("edited_log_prob", targets)):
        pairs = list(zip(prompts, answers, strict=True))
        assert before[column].tolist() == pytest.approx(answer_log_probs(model, tokenizer, pairs))
    summary = summarise_locality(before, ask(model, tokenizer, QUESTIONS, targets))
    assert summary["unchanged"] == 100
    assert summary["accuracy_change"] == summary["log_prob_change"] == summary["edited_log_prob_change"] == 0
    summary = summarise_locality(before.assign(correct=[1, 1, 0]), before)
    assert summary["accuracy_change"] == pytest.approx(-200 / 3)


def test_an_edit_without_an_old_answer_is_compared_with_what_the_base_writes_and_may_lack_a_paraphrase():
    model, tokenizer = writer(), tiny_tokenizer()
    bare, whole = Edit("Thing 0 is", None, "blue"), EDITS[1]
    first, second = with_old_answers(model, tokenizer, [bare, whole])
    written = continuations(model, tokenizer, [bare.prompt], 8)[0]
    assert (first.old, second) == (written.strip().partition("\n")[0] or ".", whole)
    records = measure_edits(model, tokenizer, {0: first, 1: second})
    assert records["paraphrase_success"].isna().tolist() == [True, False]
    found = summarise(records)
    assert found["all"]["paraphrase_success"] == 100 * records["paraphrase_success"][1]
