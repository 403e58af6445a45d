"""`hiplora probe` on tiny models: what it measures, resumes and refuses."""

import json

import pytest
import torch

from hiplora.cli import probe as command
from hiplora.evaluation import BaseReference, measure_drift
from hiplora.models import load
from hiplora.probing import directions_of, intervened
from hiplora.probing import run as probe_run
from tests.commands import run
from tests.tiny import tiny_tokenizer
from tests.unit.adapters.samples import save_tiny_gpt2

PROSE = "The harbour master writes down every ship that comes in, and what it carries, and from where. " * 4
MODULES = ("--modules", "q_proj,v_proj", "--layers", "1")


@pytest.fixture
def prose(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text(PROSE)
    return path


def options(prose, *more):
    return ["--text", prose, "--tokens", 60, "--directions", 3, *(more or MODULES)]


def probed(capsys, model, out, *arguments):
    code, said, err = run(capsys, "probe", model, "--out", out, *arguments, "--json")
    assert (code, err) == (0, "")
    shown, kept = json.loads(said), json.loads((out / "probe.json").read_text())
    assert shown == {"out": str(out), **{key: value for key, value in kept.items() if key != "records"}}
    return kept


def test_every_direction_is_measured_under_every_intervention(tiny_model_dir, prose, tmp_path, capsys):
    out = tmp_path / "out"
    record = probed(
        capsys, tiny_model_dir, out, *options(prose), "--draws", "2", "--noise", "0.1", "--noise", "0.5"
    )
    assert record["modules"] == [f"model.layers.1.self_attn.{name}_proj" for name in "qv"]
    kinds = [row["kind"] for row in record["records"]]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "zero": 6,
        "flip": 6,
        "noise_0.1": 12,
        "noise_0.5": 12,
    }
    groups = [(row["kind"], row["metric"], row["type"], row["points"]) for row in record["correlations"]]
    assert len(groups) == 4 * 2 * 3
    assert ("noise_0.5", "kl", "all", 6) in groups
    assert record["text"] == {"source": "file prose.txt", "tokens": {"prose.txt": 59}}
    assert {"commit", "seed", "texts"} <= set(record["provenance"])
    assert "q_proj" in (out / "report.html").read_text()
    assert not (out / probe_run.ROWS).exists()


def test_a_drop_is_the_drift_of_the_intervened_model(tiny_model_dir, prose, tmp_path, capsys):
    record = probed(capsys, tiny_model_dir, tmp_path / "out", *options(prose), "--kinds", "flip")
    model, tokenizer = load(str(tiny_model_dir))
    reference = BaseReference.build(model, tokenizer, {"a": PROSE}, max_tokens=60)
    row = record["records"][0]
    (direction,) = (d for d in directions_of(model, [row["module"]], 1))
    module, weight = model.get_submodule(row["module"]), model.get_submodule(row["module"]).weight
    with intervened(model, direction, -2.0):
        changed = module.weight

        class Off:
            def __enter__(self):
                module.weight = weight

            def __exit__(self, *error):
                module.weight = changed

        found = measure_drift(model, reference, Off)["a"]
    assert row["drop"]["kl"] == pytest.approx(found.kl, rel=1e-4)
    assert row["drop"]["kl"] > 0
    assert row["drop"]["log_perplexity"] == pytest.approx(
        torch.tensor(found.perplexity_ratio).log().item(), rel=1e-3
    )


def test_an_interrupted_probe_goes_on_where_it_stopped(tiny_model_dir, prose, tmp_path, capsys, monkeypatch):
    whole = probed(capsys, tiny_model_dir, tmp_path / "whole", *options(prose))
    calls, real = [], probe_run.measure_drift

    def counted(*arguments, **named):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(probe_run, "measure_drift", counted)
    out = tmp_path / "out"
    assert run(capsys, "probe", tiny_model_dir, "--out", out, *options(prose))[0] == 130
    journal = out / probe_run.ROWS
    assert len(journal.read_text().splitlines()) == 4
    with journal.open("a") as file:
        file.write('{"module": "cut o')  # as a killed process leaves it
    record = probed(capsys, tiny_model_dir, out, *options(prose))
    assert len(calls) == 5 + len(whole["records"]) - 4
    assert record["records"] == whole["records"]


def test_an_unfinished_probe_of_something_else_is_not_mixed_in(
    tiny_model_dir, prose, tmp_path, capsys, monkeypatch
):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(probe_run, "measure_drift", stopped)
        assert run(capsys, "probe", tiny_model_dir, "--out", out, *options(prose))[0] == 130
    code, _, err = run(capsys, "probe", tiny_model_dir, "--out", out, *options(prose), "--seed", "1")
    assert code == 2
    assert "settings.seed: 0 there, 1 here" in err
    assert (
        probed(capsys, tiny_model_dir, out, *options(prose), "--seed", "1", "--overwrite")["settings"]["seed"]
        == 1
    )


def test_directions_of_the_activation_basis_and_a_transposed_model(prose, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(probe_run, "CALIBRATION_TOKENS", 300)
    model = save_tiny_gpt2(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(model)
    record = probed(
        capsys,
        model,
        tmp_path / "out",
        *options(prose, "--modules", "c_attn"),
        "--basis",
        "activation",
        "--principal-rank",
        "4",
    )
    weight = probed(capsys, model, tmp_path / "weight", *options(prose, "--modules", "c_attn"))
    assert {row["type"] for row in record["records"]} == {"c_attn"}
    assert {row["rank"] for row in record["records"]} == {4}
    assert 0 < record["records"][0]["sigma"] < 0.999 * weight["records"][0]["sigma"]


def test_the_table_says_why_a_correlation_is_missing(tiny_model_dir, prose, tmp_path, capsys):
    arguments = ["--text", prose, "--tokens", 60, "--directions", 2, "--modules", "q_proj", "--layers", "0"]
    code, out, _ = run(
        capsys, "probe", tiny_model_dir, "--out", tmp_path / "out", *arguments, "--kinds", "zero"
    )
    assert code == 0
    assert "2 directions; a correlation takes at least 3" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokens", "40", "--out", "."], "exists already"),
        (["--kinds", "zero", "--noise", "0.2"], "--noise 0.2: --kinds zero has no noise"),
        (["--kinds", "zap"], "intervention 'zap': expected zero, flip"),
        (["--layers", "3-1"], "--layers 3-1: 3-1 goes backwards"),
        (["--layers", "one"], "--layers one: expected numbers and spans"),
        (["--layers", "0,9"], "layer 9 has none of the requested modules"),
        (["--directions", "33", "--modules", "k_proj"], "33 directions of 32"),
        (["--text", "nowhere.txt"], "nowhere.txt: cannot be read"),
    ],
)
def test_a_users_mistake_is_one_line(tiny_model_dir, prose, tmp_path, capsys, arguments, said):
    given = ["--text", prose, *arguments]
    code, out, err = run(capsys, "probe", tiny_model_dir, "--out", tmp_path / "out", *given)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert said in err
    assert not (tmp_path / "out").exists()


def test_layers_are_numbers_spans_or_all():
    assert command.parse_layers("0,4-6,5") == (0, 4, 5, 6)
    assert (command.parse_layers(None), command.parse_layers("all")) == (None, ())


def test_layers_that_are_not_named_are_spread_over_the_model(tiny_model_dir, prose, tmp_path, capsys):
    arguments = ["--text", prose, "--tokens", 40, "--directions", 1, "--modules", "q_proj", "--kinds", "zero"]
    record = probed(capsys, tiny_model_dir, tmp_path / "out", *arguments)
    assert [row["layer"] for row in record["records"]] == [0, 1]
