"""The numbers of lm-eval's own model, with less to compute."""

import itertools

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import BloomConfig, BloomForCausalLM

from hiplora.evaluation import lm as module
from hiplora.evaluation.lm import AnswerLM, Question
from tiny import VOCABULARY, tiny_llama, tiny_tokenizer

CONTEXTS = ["Question: what falls from a cloud?\nAnswer:", "A short one:", "x" * 90]
ANSWERS = [" rain", " a stone that nobody threw", "r", " rainbows"]


def asked(contexts=CONTEXTS, answers=ANSWERS):
    pairs = list(itertools.product(contexts, answers))
    return [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i) for i, pair in enumerate(pairs)
    ]


def rolling(texts):
    return [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=i)
        for i, text in enumerate(texts)
    ]


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture
def ours(model):
    return AnswerLM(model, tiny_tokenizer(), batch_size=3)


@pytest.fixture(scope="module")
def theirs(model):
    return HFLM(pretrained=model, tokenizer=tiny_tokenizer(), batch_size=3)


def assert_same(found, expected):
    for (total, greedy), (other, other_greedy) in zip(found, expected, strict=True):
        assert total == pytest.approx(other, abs=1e-3)
        assert greedy == other_greedy


def test_answers_score_as_with_lm_eval(ours, theirs):
    requests = asked()
    assert_same(
        ours.loglikelihood(requests, disable_tqdm=True), theirs.loglikelihood(requests, disable_tqdm=True)
    )


def test_answers_of_one_token_share_one_pass(ours, theirs, monkeypatch):
    rows = []
    monkeypatch.setattr(
        ours, "_score", lambda batch, score=ours._score: rows.append(len(batch)) or score(batch)
    )
    requests = asked(answers=["a", "b", "c", "d"])
    assert_same(ours.loglikelihood(requests, disable_tqdm=True), theirs.loglikelihood(requests))
    assert sum(rows) == len(CONTEXTS)


def test_answers_of_several_tokens_share_the_pass_over_their_question(ours, monkeypatch):
    read = []
    inputs = ours._inputs
    monkeypatch.setattr(ours, "_inputs", lambda batch: read.append(inputs(batch)) or read[-1])
    ours._shares_well = lambda question: True
    ours.loglikelihood(asked(contexts=["x" * 90]), disable_tqdm=True)
    (only,) = read
    assert only["input_ids"].shape[0] == 1
    assert only["attention_mask"].dim() == 4


def test_a_model_that_takes_no_masks_is_asked_answer_by_answer(ours, theirs, monkeypatch):
    monkeypatch.setattr(ours, "_shares_well", lambda question: False)
    seen = []
    inputs = ours._inputs
    monkeypatch.setattr(ours, "_inputs", lambda batch: seen.append(inputs(batch)) or seen[-1])
    requests = asked()
    assert_same(ours.loglikelihood(requests, disable_tqdm=True), theirs.loglikelihood(requests))
    assert all(inputs["attention_mask"].dim() == 2 for inputs in seen)


def test_a_model_that_takes_no_positions_is_scored_in_lm_evals_own_way():
    """BLOOM has no position ids: its attention is biased by distance."""
    bloom = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=2)).eval()
    done = []
    ours = AnswerLM(bloom, tiny_tokenizer(), batch_size=3, on_progress=done.append)
    requests = asked()
    expected = HFLM(pretrained=bloom, tokenizer=tiny_tokenizer(), batch_size=3).loglikelihood(requests)
    assert_same(ours.loglikelihood(requests, disable_tqdm=True), expected)
    assert ours.tokens[CONTEXTS[0], " rain"] == 5
    assert sum(done) == len(requests)


def test_a_mask_that_the_model_ignores_is_noticed(ours, monkeypatch):
    inputs = ours._inputs

    def unmasked(batch):
        found = inputs(batch)
        if found["attention_mask"].dim() == 4:
            found["attention_mask"] = torch.ones_like(found["input_ids"])
        return found

    monkeypatch.setattr(ours, "_inputs", unmasked)
    tokens = tuple(ours.tok_encode("x" * 60))
    answers = {tuple(ours.tok_encode(text)): [0] for text in ANSWERS}
    assert not ours._shares_well(Question(tokens, answers))


def test_whole_texts_score_as_with_lm_eval_and_their_tokens_are_counted(ours, theirs):
    texts = [
        "A text of some words. " * 5,
        "z" * 3000,
        "A text of some words. " * 4,
    ]  # the second needs two windows
    requests = rolling(texts)
    found = ours.loglikelihood_rolling(requests)
    assert found == pytest.approx(theirs.loglikelihood_rolling(requests, disable_tqdm=True), rel=1e-5)
    assert [ours.tokens[(text,)] for text in texts] == [len(text) for text in texts]


def test_a_context_that_is_too_long_loses_its_beginning_as_with_lm_eval(theirs, ours):
    requests = asked(contexts=["ab" * 1100], answers=[" end", "c"])
    assert_same(ours.loglikelihood(requests, disable_tqdm=True), theirs.loglikelihood(requests))


def test_the_tokens_of_every_answer_are_known(ours):
    ours.loglikelihood(asked(), disable_tqdm=True)
    assert ours.tokens[CONTEXTS[0], " rain"] == 5


def test_a_pair_that_is_asked_twice_is_answered_twice(ours):
    requests = asked() + asked()
    found = ours.loglikelihood(requests, disable_tqdm=True)
    assert found[: len(found) // 2] == found[len(found) // 2 :]


def test_progress_counts_every_request(model):
    done = []
    lm = AnswerLM(model, tiny_tokenizer(), batch_size=2, on_progress=done.append)
    lm.loglikelihood(asked(), disable_tqdm=True)
    assert sum(done) == len(CONTEXTS) * 4


def test_batches_are_small_enough_for_their_logits(monkeypatch):
    monkeypatch.setattr(module, "_POSITIONS", 40)
    questions = [Question(tuple(range(30)), {tuple(range(15 + i)): [i]}) for i in range(5)]
    batches = list(module._batches(questions, size=8))
    assert max(map(len, batches)) > 1
    assert all(
        len(batch) == 1 or len(batch) * (1 + max(question.span for question in batch)) <= 40
        for batch in batches
    )
    assert sum(map(len, batches)) == 5
