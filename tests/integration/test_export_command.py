import inspect
import json
import shlex

import pytest
import torch
from peft import LoraConfig

from hiplora.cli import export as command
from tests.commands import run
from tests.unit.adapters.samples import (
    ATTENTION,
    base_model,
    hip_config,
    leaky,
    logits,
    logits_of_stock_process,
    saved,
)


@pytest.fixture(scope="session")
def adapter(tiny_model_dir, tmp_path_factory):
    return saved(tiny_model_dir, tmp_path_factory.mktemp("cli") / "adapter", hip_config())


def test_the_example_of_the_help_runs(adapter, tmp_path, monkeypatch, capsys):
    lines = inspect.getdoc(command.command).splitlines()
    assert lines[-3] == "Example:"
    example = shlex.split(lines[-1])
    assert example[:2] == ["hiplora", "export"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "medicine").symlink_to(adapter[0])
    code, out, _ = run(capsys, *example[1:])
    assert code == 0
    assert (tmp_path / example[-1] / "adapter_model.safetensors").exists()
    assert "Rank" in out


def test_lora_prints_the_differences_and_what_servers_want(adapter, tmp_path, capsys):
    code, out, err = run(
        capsys, "export", adapter[0], "--to", "lora", "--out", tmp_path / "out", "--pad-rank", 64
    )
    assert (code, err) == (0, "")
    assert "Largest difference of a module's update" in out
    assert "--max-lora-rank 64" in out


def test_json_is_one_object_with_the_report_and_the_preflight(adapter, tmp_path, capsys):
    code, out, _ = run(
        capsys, "export", adapter[0], "--to", "lora", "--out", tmp_path / "out", "--pad-rank", 64, "--json"
    )
    record = json.loads(out)
    assert code == 0
    assert (record["to"], record["rank"], record["path"]) == ("lora", 64, str(tmp_path / "out"))
    assert record["largest_difference"]["relative"] < 1e-6
    assert record["logit_difference"] < 1e-5
    assert record["preflight"] == [
        {
            "server": "vLLM",
            "blocks": False,
            "problem": "rank 64 is above its default max_lora_rank of 16",
            "remedy": "start it with --max-lora-rank 64",
        }
    ]


def test_logits_are_left_out_on_request(adapter, tmp_path, capsys):
    _, out, _ = run(
        capsys, "export", adapter[0], "--to", "lora", "--out", tmp_path / "out", "--no-logits", "--json"
    )
    assert json.loads(out)["logit_difference"] is None


def test_dense_gives_a_model_that_needs_no_adapter(adapter, tmp_path, capsys):
    code, out, _ = run(capsys, "export", adapter[0], "--to", "dense", "--out", tmp_path / "out", "--json")
    assert code == 0
    assert json.loads(out)["modules"] == 8
    torch.testing.assert_close(logits(base_model(tmp_path / "out")), logits(adapter[1]), rtol=1e-4, atol=1e-5)


def test_dense_prints_a_table(adapter, tmp_path, capsys):
    code, out, _ = run(
        capsys, "export", adapter[0], "--to", "dense", "--out", tmp_path / "out", "--dtype", "bfloat16"
    )
    assert code == 0
    assert "bfloat16" in out
    assert "Largest difference of a weight" in out


def test_dense_writes_files_of_the_size_that_is_asked_for(adapter, tmp_path, capsys):
    options = ["--to", "dense", "--out", tmp_path / "out", "--max-shard-size", "100KB", "--no-logits"]
    code, out, _ = run(capsys, "export", adapter[0], *options, "--json")
    record = json.loads(out)
    assert code == 0
    assert record["streamed"]
    assert record["logits"] is None
    assert sorted(file.name for file in (tmp_path / "out").glob("*.safetensors")) == record["files"]
    assert all((tmp_path / "out" / file).stat().st_size < 110_000 for file in record["files"])
    torch.testing.assert_close(logits(base_model(tmp_path / "out")), logits(adapter[1]), rtol=1e-4, atol=1e-5)


def test_dense_says_why_logits_were_not_compared(adapter, tmp_path, capsys):
    _, out, _ = run(capsys, "export", adapter[0], "--to", "dense", "--out", tmp_path / "out", "--no-logits")
    assert "not compared" in out
    assert "switched off" in out


def test_strict_refuses_what_a_server_would_misread_and_writes_nothing(tiny_model_dir, tmp_path, capsys):
    folder, _ = saved(
        tiny_model_dir, tmp_path / "a", LoraConfig(target_modules=ATTENTION, rank_pattern={"q_proj": 2})
    )
    code, _, err = run(capsys, "export", folder, "--to", "lora", "--out", tmp_path / "out", "--strict")
    assert code == 1
    assert "llama.cpp" in err
    assert "--pad-rank 8" in err
    assert not (tmp_path / "out").exists()
    code, _, _ = run(
        capsys, "export", folder, "--to", "lora", "--out", tmp_path / "out", "--strict", "--pad-rank", 8
    )
    assert code == 0


def test_failures_are_one_line_and_status_1(tiny_model_dir, tmp_path, capsys):
    folder, module = leaky(tiny_model_dir, tmp_path / "a")
    code, out, err = run(capsys, "export", folder, "--to", "lora", "--out", tmp_path / "out")
    assert (code, out) == (1, "")
    assert module in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--to", "gguf", "--out", "out"],
        ["--to", "lora"],
        ["--to", "lora", "--out", "out", "--pad-rank", "0"],
        ["--to", "lora", "--out", "out", "--dtype", "int8"],
        ["--to", "dense", "--out", "out", "--pad-rank", "64"],
        ["--to", "dense", "--out", "out", "--strict"],
        ["--to", "dense", "--out", "out", "--max-shard-size", "much"],
        ["--to", "lora", "--out", "out", "--max-shard-size", "1GB"],
        ["--to", "lora", "--out", "there"],
    ],
)
def test_wrong_usage_is_status_2_and_writes_nothing(adapter, tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    code, out, err = run(capsys, "export", adapter[0], *arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.real_model
@pytest.mark.slow
def test_a_hiplora_adapter_of_the_real_model_is_exported_exactly(smollm2, tmp_path, capsys):
    config = hip_config(
        r=8, principal_rank=16, target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 15, 29]
    )
    folder, model = saved(smollm2, tmp_path / "a", config)
    expected = logits(model)
    del model
    code, out, _ = run(capsys, "export", folder, "--to", "lora", "--out", tmp_path / "out", "--json")
    record = json.loads(out)
    assert code == 0
    assert record["logit_difference"] < 1e-4
    found = logits_of_stock_process(smollm2, tmp_path / "out", tmp_path)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (expected - logits(base_model(smollm2))).abs().max() > 0.1
