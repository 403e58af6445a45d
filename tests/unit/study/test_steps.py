"""What a worker reads of the drift texts, and how it chooses among results."""

from dataclasses import replace

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hiplora.errors import DataError
from hiplora.study.jobs import Job
from hiplora.study.steps import Context, collect, merge_adapters
from hiplora.study.store import Place
from tests.models.zoo import CASE
from tests.tiny import tiny_tokenizer, write_jsonl


def test_rows_are_one_text_or_texts_of_their_own(tmp_path):
    write_jsonl(tmp_path / "wiki.jsonl", [{"title": f"T{n}", "text": f"Text {n}."} for n in range(5)])
    context = Context(Place(tmp_path / "store", "pico", tmp_path))
    assert context.text("wiki.jsonl") == "Text 0.Text 1.Text 2.Text 3.Text 4."
    assert context.text("wiki.jsonl:title") == "T0\nT1\nT2\nT3\nT4"
    assert context.text("wiki.jsonl", 2) == ["Text 0.", "Text 1."]
    assert context.text("wiki.jsonl:title+text", 1) == ["T0Text 0."]
    assert context.place.located("wiki.jsonl") == str(tmp_path / "wiki.jsonl")
    assert context.place.located("owner/name") == "owner/name"
    assert Place(tmp_path, "pico").located("wiki.jsonl") == "wiki.jsonl"


@pytest.mark.parametrize(("source", "line"), [("wiki.jsonl:body", 1), ("wiki.jsonl:text", 2)])
def test_a_row_without_the_field_of_a_drift_text_is_named_with_those_that_it_has(tmp_path, source, line):
    write_jsonl(tmp_path / "wiki.jsonl", [{"title": "T", "text": "A text."}, {"title": "T", "text": None}])
    with pytest.raises(DataError, match=rf"line {line}: has no text '\w+'; its fields are title, text: name some as"):
        Context(Place(tmp_path / "store", "pico", tmp_path)).text(source)


@pytest.mark.parametrize(("best", "at_the_edge"), [(0.3, False), (0.1, True), (1.0, True)])
def test_the_edges_of_a_grid_are_its_least_and_largest_values_in_whatever_order_they_stand(
    tmp_path, best, at_the_edge
):
    context, needs = Context(Place(tmp_path, "pico")), {}
    for value in (0.3, 1.0, 0.1):
        needs[str(value)] = Job("train", 1, f"train {value}", {"value": value})
        context.store.finish(needs[str(value)], {"loss": 1.0 + (value != best)}, {}, artifact=False)
    settings = {"field": "loss", "candidates": [{"value": float(name), "needs": [name]} for name in needs]}
    result, _ = collect(context, Job("collect", 1, "choose", settings, needs), settings)
    assert (result["value"], result["at_the_edge"]) == (best, at_the_edge)


def test_adapters_of_experts_are_merged_and_measured_too(tmp_path):
    case = replace(CASE["Qwen3-MoE"], settings={**CASE["Qwen3-MoE"].settings, "vocab_size": 256})
    case.make().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text("In the summer the market stands by the harbour. " * 4)
    context, needs = Context(Place(tmp_path, str(tmp_path / "base"))), {}
    for name in ("facts", "sums"):
        needs[name] = Job("train", 1, name, {"domain": name})
        config = LoraConfig(r=2, init_lora_weights=False, target_parameters=["mlp.experts.down_proj"])
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
        adapted.save_pretrained(context.store.artifact(needs[name]))
    drift = {"texts": {"prose": str(tmp_path / "text.txt")}, "tokens": 32, "window": 32}
    settings = {"rule": "addition", "options": {}, "tasks": {}, "seed": 0, "drift": drift}
    found, _ = merge_adapters(context, Job("merge", 1, "merge", settings, needs), settings)
    assert found["drift"]["prose"]["kl"] > 1e-3
