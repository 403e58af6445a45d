"""lm-eval's own numbers, with the tokens counted and the memory bounded."""

import itertools

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from hiplora.evaluation import engine as module
from hiplora.evaluation.engine import ScoringLM
from tests.tiny import tiny_llama, tiny_tokenizer

CONTEXTS = ["Question: what falls from a cloud?\nAnswer:", "A short one:", "x" * 90]
ANSWERS = [" rain", " a stone that nobody threw", "r", " rainbows"]
PAIRS = list(itertools.product(CONTEXTS, ANSWERS))


def asked(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=given, idx=i) for i, given in enumerate(arguments)]


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture
def ours(model):
    return ScoringLM(model, tiny_tokenizer(), batch_size=3)


def test_scores_are_lm_evals_in_the_order_of_the_requests(model, ours, monkeypatch):
    monkeypatch.setattr(module, "_LOGITS", 4 * ours.vocab_size * 200)  # one or two rows at a time
    sizes = []
    call = ours._model_call
    monkeypatch.setattr(ours, "_model_call", lambda rows: sizes.append(tuple(rows.shape)) or call(rows))
    requests = asked("loglikelihood", PAIRS)
    found = ours.loglikelihood(requests, disable_tqdm=True)
    theirs = HFLM(pretrained=model, tokenizer=tiny_tokenizer(), batch_size=3)
    for (total, greedy), (other, other_greedy) in zip(
        found, theirs.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        assert total == pytest.approx(other, abs=1e-3)
        assert greedy == other_greedy
    assert all(rows == 1 or rows * length <= 200 for rows, length in sizes)
    assert max(rows for rows, _ in sizes) == 3
    assert ours.batch_size == 3


def test_the_tokens_of_answers_and_texts_are_counted(ours):
    ours.loglikelihood(asked("loglikelihood", PAIRS), disable_tqdm=True)
    ours.loglikelihood_rolling(asked("loglikelihood_rolling", [("a text",)]), disable_tqdm=True)
    assert ours.tokens[CONTEXTS[0], " rain"] == 5
    assert ours.tokens[("a text",)] == 6


def test_a_whole_text_is_scored_token_by_token(model, ours):
    (found,) = ours.loglikelihood_rolling(asked("loglikelihood_rolling", [("a text",)]), disable_tqdm=True)
    ids = [ours.prefix_token_id, *tiny_tokenizer()("a text")["input_ids"]]
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    assert found == pytest.approx(log_probs.gather(1, torch.tensor(ids[1:])[:, None]).sum().item(), abs=1e-4)
