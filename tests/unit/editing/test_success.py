import pytest
import torch

from hiplora.editing import Edit, EditOutcome, evaluate_edits, score
from hiplora.editing.success import normalise
from tests.tiny import tiny_llama, tiny_tokenizer

EDITS = [
    Edit("The sky is", "blue", "green", "sky", "Entity/Attribute", "Look up, it is"),
    Edit("One and one and one make", "three", "8", "sum", "Temporal/Numeric", "1+1+1="),
]


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
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    model.generation_config.eos_token_id = None
    for edit, outcome in zip(
        EDITS, evaluate_edits(model, tokenizer, EDITS, paraphrase=paraphrase), strict=True
    ):
        prompt = edit.paraphrase if paraphrase else edit.prompt
        assert outcome.log_prob_new == pytest.approx(
            by_hand(model, tokenizer, prompt, f" {edit.new}"), abs=1e-4
        )
        assert outcome.log_prob_old == pytest.approx(
            by_hand(model, tokenizer, prompt, f" {edit.old}"), abs=1e-4
        )
        assert outcome.continuation == greedy(
            model, tokenizer, prompt, 9
        )  # " green", longest of all, and 3 more
        assert outcome.new == edit.new


@pytest.mark.parametrize(
    ("written", "exact"),
    [
        (" Green.", True),
        (" the green one", True),
        (" GREEN\n", True),
        (" greenish", False),
        (" not green", False),
        ("", False),
    ],
)
def test_an_exact_match_is_of_whole_words_at_the_beginning(written, exact):
    assert EditOutcome(-1.0, -2.0, written, "green").exact is exact


def test_the_new_answer_is_preferred_only_if_it_is_more_likely():
    assert EditOutcome(-1.0, -1.1, "", "x").preferred
    assert not EditOutcome(-1.0, -1.0, "", "x").preferred


def test_scores_are_shares():
    outcomes = [EditOutcome(-1, -2, " x", "x"), EditOutcome(-1, -2, "y", "x"), EditOutcome(-3, -2, "x", "x")]
    assert score(outcomes).preferred == pytest.approx(2 / 3)
    assert score(outcomes).exact == pytest.approx(2 / 3)
    assert score(outcomes[:2]).exact == 0.5
    assert score(outcomes).count == 3


def test_normalising_drops_case_punctuation_spaces_and_a_leading_article():
    assert normalise("  The  White-House, D.C. ") == "white house d c"
    assert normalise("Ａ") == ""  # a full-width article
    assert normalise("under_score") == "under score"
    assert normalise("Thebes") == "thebes"


def test_the_mode_of_the_model_is_put_back():
    model = tiny_llama().train()
    evaluate_edits(model, tiny_tokenizer(), EDITS)
    assert model.training
