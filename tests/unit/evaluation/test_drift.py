import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hiplora import HipLoraConfig
from hiplora.errors import AdapterError, DataError
from hiplora.evaluation import BaseReference, measure_drift
from hiplora.evaluation.drift import cut_windows
from tests.tiny import tiny_llama, tiny_tokenizer

TEXTS = {
    "prose": "It was a bright cold day in April, and nobody minded. " * 4,
    "code": "for i in x:\n    print(i)\n" * 5,
}


def adapted(model, method="lora"):
    config = (
        LoraConfig(r=4, lora_alpha=1, init_lora_weights=False, target_modules=["q_proj", "v_proj"], lora_dropout=0.5)
        if method == "lora"
        else HipLoraConfig(r=4, preset="paper", lora_alpha=1, principal_rank=8, init_weights=False)
    )
    torch.manual_seed(1)
    return get_peft_model(model, config)


def build(model):
    return BaseReference.build(model, tiny_tokenizer(), TEXTS, window=64, max_tokens=200)


def dense_drift(base, model, windows):
    """The definition, position by position, in float64 with the whole softmax at once."""
    kl, change, changed, tokens = 0.0, 0.0, 0, 0
    for ids in windows:
        p = base(ids[None]).logits[0, :-1].double().log_softmax(-1)
        q = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
        for t in range(len(ids) - 1):
            kl += (p[t].exp() * (p[t] - q[t])).sum().item()
            change += (p[t] - q[t])[ids[t + 1]].item()
            changed += bool(p[t].argmax() != q[t].argmax())
            tokens += 1
    return kl / tokens, math.exp(change / tokens), tokens, changed / tokens


@pytest.mark.parametrize("method", ["lora", "hiplora"])
@torch.no_grad()
def test_drift_agrees_with_its_definition(method):
    model = tiny_llama()
    reference = build(model)
    found = measure_drift(adapted(model, method).eval(), reference)
    other = adapted(tiny_llama(), method).eval()
    assert list(found) == ["prose", "code"]
    for name, windows in reference.windows.items():
        kl, ratio, tokens, changed = dense_drift(tiny_llama(), other, windows)
        assert found[name].kl == pytest.approx(kl, rel=1e-4)
        assert found[name].kl > 1e-4
        assert found[name].perplexity_ratio == pytest.approx(ratio, rel=1e-5)
        assert found[name].tokens == tokens
        assert found[name].greedy_changed == pytest.approx(changed, abs=1e-9)
        assert 0 < changed < 1


def test_documents_are_read_apart_the_first_window_of_each_and_every_token_weighs_the_same():
    model = tiny_llama()
    documents = [TEXTS["prose"], "Short.", TEXTS["code"]]
    texts = {"wiki": documents, "prose": TEXTS["prose"]}
    reference = BaseReference.build(model, tiny_tokenizer(), texts, window=32, max_tokens=64)
    windows = reference.windows["wiki"]
    assert [len(ids) for ids in windows] == [32, len(tiny_tokenizer()("Short.")["input_ids"]), 32]
    for ids, document in zip(windows, documents, strict=True):
        assert ids.tolist() == tiny_tokenizer()(document)["input_ids"][: len(ids)]
    assert [len(ids) for ids in reference.windows["prose"]] == [32, 32]
    peft = adapted(model).eval()
    with torch.no_grad():
        _, ratio, tokens, _ = dense_drift(tiny_llama(), adapted(tiny_llama()).eval(), windows)
    found = measure_drift(peft, reference)["wiki"]
    assert (found.perplexity_ratio, found.tokens) == (pytest.approx(ratio, rel=1e-5), tokens)


def test_the_direction_is_from_the_base_to_the_adapted_model():
    model = tiny_llama()
    reference = build(model)
    peft = adapted(model).eval()
    with torch.no_grad():  # make one token certain, which the two directions see very differently
        found = measure_drift(_Certain(peft), reference, peft.disable_adapter)["prose"].kl
        (ids, *_), certain = reference.windows["prose"], _Certain(peft)
        q = certain(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1)
        p = reference.kept["prose", 0].double()
    forward, backward = ((p.exp() * (p - q)).sum(-1).mean().item(), (q.exp() * (q - p)).sum(-1).mean().item())
    assert abs(forward - backward) > 0.5
    assert found == pytest.approx(forward, rel=0.05)  # the other windows are much like this one


class _Certain(torch.nn.Module):
    """The adapted model, nearly sure of one token; the base as it is while the adapter is off."""

    def __init__(self, peft):
        super().__init__()
        self.peft = peft

    def forward(self, input_ids, **options):
        output = self.peft(input_ids=input_ids, **options)
        if not self.peft.base_model.model.model.layers[0].self_attn.q_proj.disable_adapters:
            output.logits[..., 7] += 12
        return output


def test_a_reference_too_large_to_keep_gives_the_same_numbers(monkeypatch):
    model = tiny_llama()
    kept = build(model)
    monkeypatch.setattr("hiplora.evaluation.drift._KEPT", 0)
    fresh = build(model)
    assert kept.kept.keys() - fresh.kept.keys() >= {("prose", 1)}
    peft = adapted(model)
    assert measure_drift(peft, kept) == measure_drift(peft, fresh)


def test_an_adapter_that_changes_nothing_is_refused():
    model = tiny_llama()
    reference = build(model)
    peft = get_peft_model(model, HipLoraConfig(r=4, preset="paper", principal_rank=8))
    with pytest.raises(AdapterError, match="changes no logit"):
        measure_drift(peft, reference)


def test_a_changed_base_is_refused():
    model = tiny_llama()
    reference = build(model)
    peft = adapted(model)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 0.5
    with pytest.raises(AdapterError, match="not the base bit for bit"):
        measure_drift(peft, reference)


def test_windows_hold_each_token_once_up_to_the_limit():
    tokenizer = tiny_tokenizer()
    (windows,) = cut_windows(tokenizer, {"a": "abcdefghij"}, window=4, max_tokens=9).values()
    assert [tokenizer.decode(ids) for ids in windows] == ["abcd", "efgh"]  # a lone last token predicts nothing


@pytest.mark.parametrize(("text", "window", "tokens"), [("a", 8, 8), ("", 8, 8), ("abc", 1, 8), ("abc", 8, 1)])
def test_too_little_text_or_too_small_a_window_is_an_error(text, window, tokens):
    with pytest.raises(DataError, match="at least 2"):
        cut_windows(tiny_tokenizer(), {"t": text}, window, tokens)
