import json

import pytest
import torch
from safetensors.torch import load_file

from hiplora.adapters import read_update
from tests.commands import quietly, succeed
from tests.tiny import write_jsonl
from tests.unit.adapters.samples import product


@pytest.fixture
def adapter(adapters):
    return adapters["one"]


def test_lora_prints_a_table_or_json_with_what_servers_want(adapter, tmp_path, capsys):
    command = ("export", adapter, "--to", "lora", "--out")
    assert "--max-lora-rank 64" in quietly(capsys, *command, tmp_path / "out", "--pad-rank", 64)
    record = json.loads(succeed(capsys, *command, tmp_path / "json", "--no-logits", "--json"))
    assert (record["to"], record["rank"], record["path"]) == ("lora", 10, str(tmp_path / "json"))
    assert record["largest_difference"]["relative"] < 1e-6
    assert (record["logit_difference"], record["preflight"]) == (None, [])


def test_the_smallest_scale_within_the_tolerance_is_written(adapter, tmp_path, capsys):
    rows = [{"prompt": f"What is {i} plus {i}?", "completion": f" It is {2 * i}."} for i in range(4)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    search = ["--tolerance", "0.01", "--data", tmp_path / "rows.jsonl", "--json"]
    record = json.loads(quietly(capsys, "export", adapter, "--to", "lora", "--out", tmp_path / "out", *search))
    losses = {row["scale"]: row["loss"] for row in record["scale_search"]["losses"]}
    assert losses[record["scale"]] <= losses[1.0] + 0.01
    before, after = read_update(adapter), read_update(tmp_path / "out")
    module = before.modules[0]
    torch.testing.assert_close(product(after, module), record["scale"] * product(before, module))


@pytest.mark.parametrize(
    "command", ["export --to lora", "export --to dense --dtype bfloat16", "merge --format hiplora"]
)
def test_the_result_is_uploaded_and_a_hiplora_adapter_as_plain_lora(adapter, hub, tmp_path, capsys, command):
    name, *options = command.split()
    folders = [adapter] * (2 if name == "merge" else 1)
    quietly(capsys, name, *folders, *options, "--out", tmp_path / "out", "--push-to-hub", "me/mine")
    config = hub / "me" / "mine" / "adapter_config.json"
    assert json.loads(config.read_text())["peft_type"] == "LORA" if "dense" not in options else not config.exists()
    tensors = load_file(next((hub / "me" / "mine").glob("*.safetensors")))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16 if "dense" in options else torch.float32}
