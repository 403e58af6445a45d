import json

import pytest
import torch
from peft import LoraConfig, PeftModel

from hiplora.adapters import read_update
from tests import reference
from tests.commands import quietly, run
from tests.tiny import save_tiny, save_with_tokenizer, tiny_mixture, tiny_tokenizer, write_jsonl
from tests.unit.adapters.samples import base_model, edit_tensors, leaky, logits, saved

PROSE = "The harbour master writes down every ship that comes in, and what it carries, and from where. " * 12


@pytest.fixture
def files(tmp_path):
    """Text to calibrate on, text to measure drift on, and rows of a task."""
    (tmp_path / "text.txt").write_text("A ship is a home that moves, said the keeper of the light. " * 20)
    (tmp_path / "drift.txt").write_text(PROSE)
    rows = [{"prompt": f"What is {i} plus {i}?", "completion": f" It is {2 * i}."} for i in range(6)]
    write_jsonl(tmp_path / "task.jsonl", rows)
    return tmp_path


def command(files, adapter, *more, tokens=600, rank=8):
    texts = ["--text", files / "text.txt", "--drift-text", files / "drift.txt", "--tokens", tokens]
    return ["protect", adapter, "--out", files / "out", "--principal-rank", rank, *texts, *more]


def protected(capsys, *arguments, **options):
    return json.loads(quietly(capsys, *command(*arguments, "--overwrite", "--json", **options)))


def test_the_record_holds_the_drift_of_adapter_and_result_and_the_cost(adapters, files, capsys, tiny_model_dir):
    record = protected(capsys, files, adapters["lora"], "--data", files / "task.jsonl")
    before, after = (record["drift"][state]["drift.txt"]["kl"] for state in ("before", "after"))
    windows = torch.tensor(tiny_tokenizer()(PROSE)["input_ids"][:1024]).split(512)
    for kl, folder in ((before, adapters["lora"]), (after, files / "out")):
        adapted = PeftModel.from_pretrained(base_model(tiny_model_dir), folder).eval()
        assert kl == pytest.approx(reference.drift(base_model(tiny_model_dir), adapted, windows)[0], rel=1e-3)
    assert after < 0.7 * before
    loss = record["loss"]
    assert (loss["file"], loss["rows"], loss["tokens"] > 0) == ("task.jsonl", 6, True)
    assert len({loss[state] for state in ("base", "before", "after")}) == 3
    assert 0 < record["norm_share"] < 1
    assert [row["module"] for row in record["modules"]] == list(read_update(adapters["lora"]).factors)
    assert record["calibration"]["source"] == "file text.txt"
    written = json.loads((files / "out" / "export.json").read_text())
    assert written["protection"] == {key: value for key, value in record.items() if key != "export"}
    assert record["export"]["logit_difference"] < 1e-5


def test_everything_taken_away_is_the_base_model(adapters, files, tiny_model_dir, capsys):
    record = protected(capsys, files, adapters["one"], rank=64)
    assert {drift["kl"] for drift in record["drift"]["after"].values()} == {0.0}
    assert any("the result is the base model" in note for note in record["notes"])
    model = PeftModel.from_pretrained(base_model(tiny_model_dir), files / "out").eval()
    assert torch.equal(logits(model), logits(base_model(tiny_model_dir)))


def test_modules_saved_whole_are_kept_and_the_notes_say_what_a_reader_should_know(adapters, files, capsys):
    rows = [{"text": f"row {i} of many"} for i in range(300)]
    write_jsonl(files / "many.jsonl", rows)
    more = ["--data", files / "many.jsonl", "--drift-text", files / "text.txt"]
    notes = " ".join(protected(capsys, files, adapters["whole"], *more, tokens=100)["notes"])
    for said in ("modules_to_save (lm_head.weight) are kept", "holds drift text too", "few for inputs"):
        assert said in notes
    assert "the first 256 of the 300 rows" in notes
    stored, original = (read_update(folder).extras for folder in (files / "out", adapters["whole"]))
    assert torch.equal(stored["lm_head.weight"], original["lm_head.weight"])


def test_an_adapter_that_cannot_be_protected_is_refused_in_a_line(adapters, tiny_model_dir, files, capsys):
    leaking, module = leaky(tiny_model_dir, files / "leaky")
    idle, _ = saved(tiny_model_dir, files / "idle", LoraConfig(target_modules=["q_proj"]))
    edit_tensors(idle, lambda tensors: [t.zero_() for name, t in tensors.items() if "lora_B" in name])
    other = save_tiny(files / "other", seed=1)
    for folder, more, expected, why in (
        (leaking, [], 1, f"{module} leaks"),
        (idle, [], 1, "changes no logit on any text"),
        (adapters["lora"], ["--principal-rank", "100"], 2, "principal_rank 100 (here 100) exceeds the 64"),
        (adapters["one"], ["--base", other], 1, "not the one that this adapter was made for"),
    ):
        code, out, err = run(capsys, *command(files, folder, *more))
        assert (code, out, why in err, "Traceback" in err) == (expected, "", True, False)
        assert not (files / "out").exists()


def test_the_experts_and_the_router_of_a_mixture_are_protected_too(files, capsys, tmp_path):
    base = save_with_tokenizer(tiny_mixture(num_hidden_layers=1), tmp_path / "base")
    folder, _ = saved(base, tmp_path / "a", LoraConfig(r=3, target_modules="all-linear"))
    record = protected(capsys, files, folder)
    shares = {row["module"].rpartition("mlp.")[2]: row["norm_share"] for row in record["modules"]}
    assert {"gate", "experts.down_proj.0", "experts.gate_up_proj.1"} < shares.keys()
    assert 0 < shares["gate"] < 1
    code, _, err = run(capsys, *command(files, folder, "--mask", "joint", "--overwrite"))
    assert (code, "mlp.gate: is no linear layer" in err, "--mask inputs" in err) == (2, True, True)
