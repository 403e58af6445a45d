import inspect
import json
import shlex
import weakref

import pytest
import torch
from peft import LoraConfig, PeftModel

from hiplora import protect as protection
from hiplora.adapters import read_update
from hiplora.adapters.base_weights import load_base
from hiplora.cli import protect as command
from hiplora.data.texts import calibration_rows
from tests.commands import run
from tests.tiny import tiny_tokenizer, write_jsonl
from tests.unit.adapters.samples import (
    ATTENTION,
    base_model,
    deltas,
    hip_config,
    logits,
    product,
    save_tiny_gpt2,
    saved,
)

TASK = [{"prompt": f"What is {i} plus {i}?", "completion": f" It is {2 * i}."} for i in range(6)]
PROSE = "The harbour master writes down every ship that comes in, and what it carries, and from where. " * 12


@pytest.fixture(scope="session")
def adapters(tiny_model_dir, tmp_path_factory):
    """Folders of trained adapters of one base model."""
    root = tmp_path_factory.mktemp("protected")
    configs = {
        "lora": LoraConfig(r=4, lora_alpha=16, target_modules=[*ATTENTION, "down_proj"]),
        "hiplora": hip_config(),
        "whole": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    }
    return {name: saved(tiny_model_dir, root / name, config)[0] for name, config in configs.items()}


@pytest.fixture
def files(tmp_path):
    """Text to calibrate on, text to measure drift on, and rows of a task."""
    (tmp_path / "text.txt").write_text("A ship is a home that moves, said the keeper of the light. " * 20)
    (tmp_path / "drift.txt").write_text(PROSE)
    write_jsonl(tmp_path / "task.jsonl", TASK)
    return tmp_path


def options(files):
    return [
        "--text",
        files / "text.txt",
        "--tokens",
        600,
        "--drift-text",
        files / "drift.txt",
        "--principal-rank",
        8,
    ]


def protected(capsys, files, adapter, *more):
    code, out, err = run(capsys, "protect", adapter, "--out", files / "out", *options(files), *more, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def read_directions(base_dir, rows, module, k):
    """The k leading directions of what a layer is fed, from a bare forward pass."""
    model, seen = load_base(str(base_dir), "auto"), []
    model.get_submodule(module).register_forward_pre_hook(lambda _, x: seen.append(x[0].detach()))
    with torch.no_grad():
        for row in rows:
            model(input_ids=row[None])
    x = torch.cat([part.flatten(0, 1) for part in seen]).double()
    return torch.linalg.eigh(x.T @ x).eigenvectors.flip(1)[:, :k]


def test_the_example_of_the_help_runs(adapters, files, monkeypatch, capsys):
    lines = inspect.getdoc(command.command).splitlines()
    assert lines[-3] == "Example:"
    example = shlex.split(lines[-1])
    assert example[:2] == ["hiplora", "protect"]
    monkeypatch.chdir(files)
    (files / "runs").mkdir()
    (files / "runs" / "medicine").symlink_to(adapters["lora"])
    (files / "task.jsonl").rename(files / "medicine.jsonl")
    code, out, err = run(capsys, *example[1:], "--tokens", 500)
    assert (code, err) == (0, "")
    assert (files / "runs" / "medicine-protected" / "adapter_model.safetensors").exists()
    for said in ("output energy left", "prose", "python code", "Loss on medicine.jsonl (6 rows)", "rank 4"):
        assert said in out


@pytest.mark.parametrize("name", ["lora", "hiplora"])
def test_the_result_reads_nothing_of_what_the_layers_are_fed_most(
    adapters, files, capsys, tiny_model_dir, name
):
    record = protected(capsys, files, adapters[name])
    before, after = read_update(adapters[name]), read_update(files / "out")
    rows = calibration_rows(tiny_tokenizer(), files / "text.txt", 600)
    assert record["calibration"] == {"source": "file text.txt", "tokens": sum(map(len, rows))}
    for module in list(before.factors)[:4]:
        E = read_directions(tiny_model_dir, rows, module, 8)
        old, new = product(before, module).double(), product(after, module).double()
        assert (old @ E).norm() > 0.1 * old.norm()
        assert (new @ E).norm() < 1e-4 * old.norm()
        torch.testing.assert_close(new, old - (old @ E) @ E.T, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def dense_drift(base_dir, folder):
    """KL of the text's windows from the base, with all of both distributions."""
    ids = tiny_tokenizer()(PROSE)["input_ids"][:1024]
    base, adapted = (base_model(base_dir), PeftModel.from_pretrained(base_model(base_dir), folder).eval())
    total = 0.0
    for window in (ids[:512], ids[512:]):
        p, q = (m(input_ids=torch.tensor([window])).logits[0, :-1].log_softmax(-1) for m in (base, adapted))
        total += (p.exp() * (p - q)).sum().item()
    return total / (len(ids) - 2)


def test_the_drift_is_that_of_the_adapter_and_of_what_was_written(adapters, files, capsys, tiny_model_dir):
    drift = protected(capsys, files, adapters["lora"])["drift"]
    before, after = (drift[state]["drift.txt"] for state in ("before", "after"))
    assert before["tokens"] == after["tokens"] == 1022
    assert before["kl"] == pytest.approx(dense_drift(tiny_model_dir, adapters["lora"]), rel=1e-3)
    assert after["kl"] == pytest.approx(dense_drift(tiny_model_dir, files / "out"), rel=1e-3)
    assert after["kl"] < 0.7 * before["kl"]


def test_the_record_has_the_cost_and_every_module(adapters, files, capsys):
    record = protected(capsys, files, adapters["lora"], "--data", files / "task.jsonl")
    loss = record["loss"]
    assert loss.keys() == {"file", "rows", "tokens", "base", "before", "after"}
    assert (loss["file"], loss["rows"]) == ("task.jsonl", 6)
    assert len({loss[state] for state in ("base", "before", "after")}) == 3
    assert record["summary"]["energy_share"] < record["summary"]["norm_share"] < 1
    assert [row["module"] for row in record["modules"]] == list(read_update(adapters["lora"]).factors)
    assert {row["width"] for row in record["modules"]} == {64, 96}


def test_strength_zero_leaves_the_adapter_as_it_is(adapters, files, capsys):
    record = protected(capsys, files, adapters["lora"], "--strength", 0)
    before, after = read_update(adapters["lora"]), read_update(files / "out")
    for module, pair in before.factors.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, after.factors[module], strict=True))
    assert record["drift"]["before"] == record["drift"]["after"]
    assert record["summary"] == {"norm_share": 1.0, "energy_share": 1.0}


def test_a_soft_or_weaker_projection_stays_between_nothing_and_all(adapters, files, capsys):
    shares = [
        protected(capsys, files, adapters["lora"], "--overwrite", *more)["summary"]["energy_share"]
        for more in ([], ["--strength", 0.5], ["--projection", "soft"])
    ]
    assert shares[0] < shares[1] < 1
    assert 0 < shares[2] < 1
    assert shares[2] != pytest.approx(shares[0], rel=1e-3)


def test_a_rank_by_energy_is_each_layers_own(adapters, files, capsys):
    record = protected(capsys, files, adapters["lora"], "--principal-rank", "energy:0.9")
    assert record["principal_rank"] == "energy:0.9"
    assert len({row["k"] for row in record["modules"]}) > 1
    assert all(row["energy_share"] < 1 for row in record["modules"])


def test_everything_taken_away_is_a_drift_of_zero_and_said(adapters, files, tiny_model_dir, capsys):
    record = protected(capsys, files, adapters["hiplora"], "--principal-rank", 64)
    assert {found["kl"] for found in record["drift"]["after"].values()} == {0.0}
    assert record["drift"]["before"]["drift.txt"]["kl"] > 0
    assert "nothing of the low-rank update is left: the result is the base model" in record["notes"]
    model = PeftModel.from_pretrained(base_model(tiny_model_dir), files / "out").eval()
    assert torch.equal(logits(model), logits(base_model(tiny_model_dir)))


def test_modules_saved_whole_are_kept_and_the_report_says_so(adapters, files, tiny_model_dir, capsys):
    record = protected(capsys, files, adapters["whole"], "--data", files / "task.jsonl")
    assert any(
        note.startswith("modules_to_save (lm_head.weight) are kept as they are") for note in record["notes"]
    )
    stored, original = read_update(files / "out"), read_update(adapters["whole"])
    assert torch.equal(stored.extras["lm_head.weight"], original.extras["lm_head.weight"])
    before, after = (record["drift"][state]["drift.txt"]["kl"] for state in ("before", "after"))
    assert 0 < after < before


def test_the_folder_is_a_stock_adapter_with_the_record_in_it(adapters, files, tiny_model_dir, capsys):
    record = protected(capsys, files, adapters["hiplora"])
    config = json.loads((files / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["base_model_name_or_path"]) == (
        "LORA",
        10,
        str(tiny_model_dir),
    )
    written = json.loads((files / "out" / "export.json").read_text())
    assert written["method"] == "projected"
    assert written["protection"] == {key: value for key, value in record.items() if key != "export"}
    assert "projected off the directions of its layers' inputs" in (files / "out" / "README.md").read_text()
    assert record["export"]["logit_difference"] < 1e-5


@pytest.mark.filterwarnings("error:fan_in_fan_out")
def test_transposed_layers_are_projected_on_their_inputs(files, capsys):
    base = save_tiny_gpt2(files / "gpt2")
    tiny_tokenizer().save_pretrained(base)
    folder, _ = saved(
        base, files / "a", LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    )
    short = ["--text", files / "text.txt", "--tokens", 60, "--drift-text", files / "drift.txt"]
    code, out, err = run(
        capsys, "protect", folder, "--out", files / "out", *short, "--principal-rank", 4, "--json"
    )
    assert code == 0, err
    record = json.loads(out)
    assert record["drift"]["after"]["drift.txt"]["kl"] < record["drift"]["before"]["drift.txt"]["kl"]
    model = PeftModel.from_pretrained(base_model(base), files / "out").eval()
    for module, delta in deltas(model).items():
        torch.testing.assert_close(delta, product(read_update(files / "out"), module), rtol=1e-5, atol=1e-6)


def test_what_a_reader_should_know_is_said(adapters, files, capsys):
    write_jsonl(
        files / "many.jsonl", [{"text": f"row {i} of many"} for i in range(300)] + [{"text": "x" * 3000}]
    )
    same = ["--drift-text", files / "text.txt", "--tokens", 100, "--data", files / "many.jsonl"]
    notes = protected(capsys, files, adapters["lora"], *same)["notes"]
    assert any("of the drift text “text.txt” stands in the calibration text too" in note for note in notes)
    assert "the loss is of the first 256 of the 301 rows of many.jsonl" in notes
    assert any(
        "calibrated on 100 tokens, few for inputs 96 wide: give at least 192" in note for note in notes
    )


def test_another_base_model_can_be_named(adapters, files, tiny_model_dir, capsys):
    folder = files / "renamed"
    folder.mkdir()
    for file in adapters["lora"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "nobody/nothing"})
    )
    record = protected(capsys, files, folder, "--base", tiny_model_dir)
    assert record["base"] == str(tiny_model_dir)
    code, out, err = run(capsys, "protect", folder, "--out", files / "other", *options(files))
    assert (code, out) == (1, "")
    assert "nobody/nothing: cannot be read" in err
    assert "--base" in err
    assert not (files / "other").exists()


def test_the_base_model_is_let_go_before_the_result_is_written(adapters, files, monkeypatch, capsys):
    """Writing loads it again to compare logits; two of a large one would not fit."""
    loaded, alive = [], []

    def load(*arguments):
        model = load_base(*arguments)
        loaded.append(weakref.ref(model))
        return model

    def save(*arguments, **options):
        alive.extend(model() for model in loaded)
        return write(*arguments, **options)

    write = protection.save_as_lora
    monkeypatch.setattr(protection, "load_base", load)
    monkeypatch.setattr(protection, "save_as_lora", save)
    protected(capsys, files, adapters["lora"])
    assert alive == [None]
