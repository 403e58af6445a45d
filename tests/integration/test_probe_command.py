"""`hiplora probe` on tiny models: what it measures and refuses."""

import html
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hiplora.cli import probe as command
from hiplora.evaluation import BaseReference, measure_drift
from hiplora.evaluation.mounting import holding
from hiplora.models import load
from hiplora.probing import correlation, directions_of, intervened
from hiplora.probing import run as probe_run
from tests.commands import quietly
from tests.tiny import VOCABULARY, save_with_tokenizer, tiny_tokenizer
from tests.unit.adapters.samples import base_model, save_tiny_gpt2

PROSE = "The harbour master writes down every ship that comes in, and what it carries, and from where. " * 4
MODULES = ("--modules", "q_proj,v_proj", "--layers", "1")


@pytest.fixture
def prose(tmp_path, monkeypatch):
    monkeypatch.setattr(correlation, "REPLICATES", 200)
    path = tmp_path / "prose.txt"
    path.write_text(PROSE)
    return path


def probed(capsys, model, out, prose, *arguments):
    options = ("--text", prose, "--tokens", 60, "--directions", 3, *arguments, "--json")
    shown = json.loads(quietly(capsys, "probe", model, "--out", out, *options))
    record = json.loads((out / "probe.json").read_text())
    assert shown == {"out": str(out), **{key: value for key, value in record.items() if key != "records"}}
    return record


def test_the_default_layers_of_a_hybrid_are_among_those_with_the_modules(prose, tmp_path, capsys):
    blocks = ["mlp", "attention", "mlp", "attention", "attention", "attention", "mlp"]
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "layers_block_type": blocks}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("nemotron_h", **sizes, **heads))
    folder = save_with_tokenizer(model, tmp_path / "hybrid")
    record = probed(capsys, folder, tmp_path / "out", prose, "--modules", "q_proj", "--kinds", "zero")
    assert {row["layer"] for row in record["records"]} == {1, 3, 5}


def test_every_direction_is_measured_under_every_intervention(tiny_model_dir, prose, tmp_path, capsys):
    noise = ("--draws", "2", "--kinds", "zero,flip,noise_0.1,noise_0.5")
    record = probed(capsys, tiny_model_dir, tmp_path / "out", prose, *MODULES, *noise)
    assert record["modules"] == [f"model.layers.1.self_attn.{name}_proj" for name in "qv"]
    kinds = [row["kind"] for row in record["records"]]
    counts = {kind: kinds.count(kind) for kind in kinds}
    assert counts == {"zero": 6, "flip": 6, "noise_0.1": 12, "noise_0.5": 12}
    groups = [(row["kind"], row["metric"], row["type"], row["points"]) for row in record["correlations"]]
    assert len(groups) == 4 * 2 * 3
    assert ("noise_0.5", "kl", "all", 6) in groups
    assert record["text"] == "file prose.txt"
    assert {"commit", "seed", "texts"} <= set(record["provenance"])
    assert "q_proj" in (page := html.unescape((tmp_path / "out" / "report.html").read_text()))
    assert record["verdict"] in page


@pytest.mark.parametrize(
    ("intervals", "drop", "said"),
    [
        (((0.1, 0.9), (0.2, 0.8)), 0.5, "larger a direction's σ, the further zero (ρ 0.50 [0.10, 0.90]) and flip"),
        (((-0.9, -0.1), (0.2, 0.8)), 0.5, "; the smaller a direction's σ, the further zero (ρ"),
        (((-0.1, 0.9), (None, None)), 0.5, "do not show whether σ predicts the effect of zero (ρ 0.50 [-0.10, 0.90])"),
        (((-0.1, 0.9), (0.2, 0.8)), None, "of direction 3 of q, after which its predictions are not finite."),
    ],
)
def test_the_verdict_is_what_the_intervals_say(intervals, drop, said):
    rows = [{"kind": "flip", "index": i, "module": "q", "drop": {"kl": kl}} for i, kl in ((2, 0.1), (3, drop))]
    correlations = [
        {"metric": "kl", "type": "all", "kind": kind, "spearman": {"estimate": 0.5, "low": low, "high": high}}
        for kind, (low, high) in zip(("zero", "flip"), intervals, strict=True)
    ]
    assert said in probe_run.verdict(rows, correlations)


def test_a_drop_is_the_drift_of_the_intervened_model(tiny_model_dir, prose, tmp_path, capsys):
    record = probed(capsys, tiny_model_dir, tmp_path / "out", prose, *MODULES, "--kinds", "flip")
    model, tokenizer = load(str(tiny_model_dir))
    reference = BaseReference.build(model, tokenizer, {"a": PROSE}, max_tokens=60)
    row = record["records"][0]
    (direction,) = directions_of(model, [row["module"]], 1)
    weights = {f"{row['module']}.weight": model.get_submodule(row["module"]).weight}
    with intervened(model, direction, -2.0):
        drift = measure_drift(model, reference, lambda: holding(model, weights))["a"]
    assert row["drop"]["kl"] == pytest.approx(drift.kl, rel=1e-4)
    assert row["drop"]["kl"] > 0
    ratio = torch.tensor(drift.perplexity_ratio)
    assert row["drop"]["log_perplexity"] == pytest.approx(ratio.log().item(), rel=1e-3)


def test_directions_of_the_activation_basis_and_a_transposed_model(prose, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(probe_run, "CALIBRATION_TOKENS", 300)
    model = save_tiny_gpt2(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(model)
    basis = ("--modules", "c_attn", "--basis", "activation", "--principal-rank", "4")
    record = probed(capsys, model, tmp_path / "out", prose, *basis)
    assert {(row["type"], row["rank"]) for row in record["records"]} == {("c_attn", 4)}
    largest = torch.linalg.matrix_norm(base_model(model).transformer.h[0].attn.c_attn.weight, 2)
    assert 0 < record["records"][0]["sigma"] < 0.999 * largest


def test_layers_are_spread_over_the_model(tiny_model_dir, prose, tmp_path, capsys):
    few = ("--directions", 1, "--modules", "q_proj", "--kinds", "zero")
    assert [row["layer"] for row in probed(capsys, tiny_model_dir, tmp_path / "out", prose, *few)["records"]] == [0, 1]


def test_layers_are_numbers_spans_or_all():
    assert command.parse_layers("0,4-6,5") == (0, 4, 5, 6)
    assert (command.parse_layers(None), command.parse_layers("all")) == (None, ())
