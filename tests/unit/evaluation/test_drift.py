import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hiplora import HipLoraConfig
from hiplora.errors import AdapterError, DataError
from hiplora.evaluation import BaseReference, measure_drift
from hiplora.evaluation.drift import cut_windows
from tests.reference import drift as reference_drift
from tests.tiny import tiny_llama, tiny_mixture, tiny_tokenizer

TEXTS = {
    "prose": "It was a bright cold day in April, and nobody minded. " * 4,
    "code": "for i in x:\n    print(i)\n" * 5,
    "documents": ["It was a bright cold day in April. " * 4, "Short.", "for i in x:\n    print(i)\n" * 5],
}
LORA = LoraConfig(r=4, lora_alpha=1, init_lora_weights=False, target_modules=["q_proj", "v_proj"], lora_dropout=0.5)
HIPLORA = HipLoraConfig(r=4, preset="paper", lora_alpha=1, principal_rank=8, init_weights=False)


def adapted(model, config=LORA):
    torch.manual_seed(1)
    return get_peft_model(model, config)


def build(model):
    return BaseReference.build(model, tiny_tokenizer(), TEXTS, window=64, max_tokens=200)


@pytest.mark.parametrize("config", [LORA, HIPLORA], ids=["lora", "hiplora"])
@torch.no_grad()
def test_drift_agrees_with_its_definition_and_documents_are_read_apart(config):
    model = tiny_llama()
    reference = build(model)
    drift = measure_drift(adapted(model, config).eval(), reference)
    other = adapted(tiny_llama(), config).eval()
    assert list(drift) == list(TEXTS)
    for name, windows in reference.windows.items():
        kl, ratio, changed, tokens = reference_drift(tiny_llama(), other, windows)
        assert drift[name].kl == pytest.approx(kl, rel=1e-4)
        assert drift[name].kl > 1e-4
        assert drift[name].perplexity_ratio == pytest.approx(ratio, rel=1e-5)
        assert drift[name].tokens == tokens
        assert drift[name].greedy_changed == pytest.approx(changed, abs=1e-9)
        assert 0 < changed < 1
    for ids, document in zip(reference.windows["documents"], TEXTS["documents"], strict=True):
        assert ids.tolist() == tiny_tokenizer()(document)["input_ids"][:64]


def test_a_reference_too_large_to_keep_gives_the_same_numbers(monkeypatch):
    model = tiny_llama()
    stored = build(model)
    monkeypatch.setattr("hiplora.evaluation.drift._KEPT", 0)
    fresh = build(model)
    assert stored.kept.keys() - fresh.kept.keys() >= {("prose", 1)}
    peft = adapted(model)
    assert measure_drift(peft, stored) == measure_drift(peft, fresh)


def test_an_adapter_that_changes_nothing_and_a_changed_base_are_refused():
    model = tiny_llama()
    reference = build(model)
    peft = adapted(model, HipLoraConfig(r=4, preset="paper", principal_rank=8))
    with pytest.raises(AdapterError, match="changes no logit"):
        measure_drift(peft, reference)
    assert measure_drift(peft, reference, may_be_nothing=True)["code"].kl == 0
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 0.5
    with pytest.raises(AdapterError, match="not the base bit for bit"):
        measure_drift(peft, reference)


def test_experts_that_run_one_by_one_and_so_round_otherwise_are_no_drift_but_another_base_is():
    model = tiny_mixture("gpt_oss")
    reference = build(model)
    config = {"r": 4, "preset": "paper", "principal_rank": 8, "target_modules": ["down_proj"]}
    peft = adapted(model, HipLoraConfig(**config))
    with torch.no_grad():
        (window, *_) = reference.windows["prose"]
        restored = peft(window[None]).logits[0, :-1].log_softmax(-1)
    assert not torch.equal(restored, reference.kept["prose", 0])  # transposed weights: this test would show nothing
    assert all(drift.kl == 0 for drift in measure_drift(peft, reference, may_be_nothing=True).values())
    trained = adapted(copy.deepcopy(peft.unload()), HipLoraConfig(**config, init_weights=False))
    assert measure_drift(trained, reference)["prose"].kl > 1e-5
    head = peft.model.lm_head.weight.data
    head += 0.1 * head.std() * torch.randn(head.shape, generator=torch.Generator().manual_seed(0))
    with pytest.raises(AdapterError, match="not the base bit for bit"):
        measure_drift(adapted(peft.model, HipLoraConfig(**config)), reference)


@pytest.mark.parametrize(("text", "window", "tokens"), [("a", 8, 8), ("", 8, 8), ("abc", 1, 8), ("abc", 8, 1)])
def test_windows_hold_each_token_once_up_to_the_limit_and_too_little_text_is_an_error(text, window, tokens):
    (windows,) = cut_windows(tiny_tokenizer(), {"a": "abcdefghij"}, window=4, max_tokens=9).values()
    assert [tiny_tokenizer().decode(ids) for ids in windows] == ["abcd", "efgh"]  # a lone last token predicts nothing
    with pytest.raises(DataError, match="at least 2"):
        cut_windows(tiny_tokenizer(), {"t": text}, window, tokens)
