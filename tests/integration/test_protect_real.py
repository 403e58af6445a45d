import json

import peft
import pytest
import torch
from peft import LoraConfig
from transformers import AutoTokenizer

from hiplora.cli.main import main
from tests.tiny import write_jsonl
from tests.unit.adapters.samples import base_model


@pytest.mark.real_model
def test_drift_of_a_real_models_adapter_falls_on_text_that_it_never_saw(smollm2, tmp_path, capsys):
    """A LoRA adapter of three layers, trained on a few lines about ships; drift on a text about something else."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    lines = [f"Ship {i} comes in on day {3 * i % 7} with {5 * i % 11} crates of oranges." for i in range(8)]
    write_jsonl(tmp_path / "task.jsonl", [{"text": line} for line in lines])
    model = base_model(smollm2)
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 14, 29]
    )
    adapted = peft.get_peft_model(model, config)
    ids = tokenizer(lines, return_tensors="pt", padding=True)["input_ids"]
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(tmp_path / "ships")
    (tmp_path / "drift.txt").write_text(
        "Bread rises because yeast turns sugar into gas, which the dough holds. " * 5
    )
    (tmp_path / "text.txt").write_text("A ship is a home that moves, said the keeper of the light. " * 20)
    options = {"--text": "text.txt", "--tokens": "400", "--drift-text": "drift.txt", "--data": "task.jsonl"}
    paths = {name: str(tmp_path / value) if "." in value else value for name, value in options.items()}
    arguments = [part for option in paths.items() for part in option]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["protect", str(tmp_path / "ships"), "--out", str(tmp_path / "out"), *arguments, "--json"])
    record = json.loads(capsys.readouterr().out)
    assert not stop.value.code
    before, after = (record["drift"][state]["drift.txt"]["kl"] for state in ("before", "after"))
    assert 0 < after < 0.5 * before
    assert record["loss"]["before"] < record["loss"]["base"]
    assert record["loss"]["after"] < record["loss"]["base"]
    assert record["summary"]["energy_share"] < 0.3
