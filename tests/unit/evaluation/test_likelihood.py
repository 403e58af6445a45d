import peft
import pytest
import torch

from hiplora.data.encoding import IGNORED
from hiplora.errors import DataError
from hiplora.evaluation import Encoded, encode, heldout_loss, response_log_probs
from hiplora.evaluation.likelihood import can_pad
from tests.models.zoo import CASE
from tests.tiny import tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXTS = [("What is red? ", "A colour."), ("q", "a much longer answer than the question"), ("Long ago, " * 5, "!")]
LABELS = tuple(t if t in (63, 64, 71, 89) else IGNORED for t in range(60, 90))
EXAMPLES = [*(encode(TOKENIZER, *text) for text in TEXTS), Encoded(tuple(range(60, 90)), LABELS)]


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def dense(model, example):
    """One example alone, unpadded, all logits, float64 softmax: what the batched path must agree with."""
    logits = model(torch.tensor([example.ids])).logits[0].double()
    log_probs = logits - logits.logsumexp(-1, keepdim=True)
    return torch.stack([log_probs[i - 1, example.ids[i]] for i in example.scored])


@pytest.mark.parametrize("name", ["RecurrentGemma", "Mamba", "Mixtral"])
@torch.no_grad()
def test_a_row_scores_the_same_in_any_batch_of_a_model_that_reads_its_padding(name):
    model = CASE[name].make()
    assert can_pad(model, (3, 4)) == (name != "RecurrentGemma")
    rows = [tuple(range(3, last)) for last in (9, 31, 60)]
    examples = [Encoded(row, (IGNORED, *row[1:])) for row in rows]
    for log_probs, example in zip(response_log_probs(model, examples), examples, strict=True):
        torch.testing.assert_close(log_probs.double(), dense(model, example), atol=2e-5, rtol=0)


def test_the_output_head_runs_over_the_responses_only():
    model, seen = tiny_llama(), []
    can_pad(model, (1, 2))
    model.lm_head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[:2]))
    texts = (("a long prompt, much of it. " * 3, "yes"), ("x", "no"))
    response_log_probs(model, [encode(TOKENIZER, *text) for text in texts])
    assert seen == [(2, 4)]  # three bytes of "yes", and the position that is dropped


def test_an_answer_begins_where_the_prompt_ends_and_gets_no_end_token_and_must_have_a_token():
    example = encode(TOKENIZER, "ab", " cd")
    assert TOKENIZER.decode(example.ids) == "ab cd"
    assert TOKENIZER.decode([example.ids[i] for i in example.scored]) == " cd"

    class Ending:
        eos_token_id, eos_token = 257, "<|eos|>"

        def __call__(self, text):
            return {"input_ids": [256, *TOKENIZER(text)["input_ids"], 257]}

    example = encode(Ending(), "ab", " c")
    assert (example.ids[0], len(example.ids), example.scored) == (256, 5, [3, 4])
    with pytest.raises(DataError, match="an example of 2 tokens has none to score"):
        encode(TOKENIZER, "ab", "")
    with pytest.raises(DataError, match="an example of 2 tokens has none to score"):
        Encoded((1, 2), (1, IGNORED))  # the first token is never predicted


def test_heldout_loss_weighs_every_token_alike_whatever_the_batches(model):
    expected = -torch.cat([dense(model, example) for example in EXAMPLES]).mean().item()
    per_example = -sum(dense(model, example).mean() for example in EXAMPLES).item() / len(EXAMPLES)
    assert abs(expected - per_example) > 1e-3  # the two means are different questions
    for size in (1, 3, 8):
        assert heldout_loss(model, EXAMPLES, size) == pytest.approx(expected, abs=1e-5)


def test_heldout_loss_switches_dropout_off_and_leaves_each_module_in_its_mode():
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(lora_dropout=0.9, init_lora_weights=False)).train()
    model.get_submodule("base_model.model.model.layers.0").eval()  # as one freezes a part
    modes = [module.training for module in model.modules()]
    first, again = (heldout_loss(model, EXAMPLES) for _ in range(2))
    assert first == again
    assert [module.training for module in model.modules()] == modes
