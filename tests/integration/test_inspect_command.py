import inspect
import json
import shlex

import pytest
from peft import LoraConfig

from hiplora.cli import inspect as command
from tests.commands import run
from tests.unit.adapters.samples import ATTENTION, hip_config, saved


@pytest.fixture(scope="session")
def adapters(tiny_model_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("inspected")
    configs = {"hiplora": hip_config(), "lora": LoraConfig(r=4, target_modules=ATTENTION)}
    return {name: saved(tiny_model_dir, root / name, config)[0] for name, config in configs.items()}


def test_the_example_of_the_help_runs(adapters, tmp_path, monkeypatch, capsys):
    lines = inspect.getdoc(command.command).splitlines()
    assert lines[-3] == "Example:"
    example = shlex.split(lines[-1])
    assert example[:2] == ["hiplora", "inspect"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "medicine").symlink_to(adapters["lora"])
    code, out, err = run(capsys, *example[1:])
    assert (code, err) == (0, "")
    assert "top 16 singular directions" in " ".join(out.split())


@pytest.mark.parametrize("name", ["hiplora", "lora"])
def test_every_module_has_a_row(adapters, capsys, name):
    code, out, _ = run(capsys, "inspect", adapters[name])
    assert code == 0
    for layer in (0, 1):
        for module in ATTENTION:
            assert f"model.layers.{layer}.self_attn.{module}" in out


def test_json_is_the_record_of_the_library(adapters, capsys):
    from hiplora.adapters import inspect_adapter

    code, out, _ = run(capsys, "inspect", adapters["hiplora"], "--rank", 8, "--json")
    assert code == 0
    assert json.loads(out) == inspect_adapter(str(adapters["hiplora"]), rank=8)


def test_html_writes_a_page_that_asks_for_nothing(adapters, tmp_path, capsys):
    page = tmp_path / "page.html"
    code, out, _ = run(capsys, "inspect", adapters["hiplora"], "--html", page)
    assert code == 0
    assert str(page) in out
    text = page.read_text()
    assert "q_proj" in text
    for loader in ('src="http', 'href="http', "url(http", "@import"):
        assert loader not in text


def test_a_page_that_exists_is_kept_unless_told_otherwise(adapters, tmp_path, capsys):
    page = tmp_path / "page.html"
    page.write_text("mine")
    code, _, err = run(capsys, "inspect", adapters["lora"], "--html", page)
    assert code == 2
    assert "--overwrite" in err
    assert page.read_text() == "mine"
    assert run(capsys, "inspect", adapters["lora"], "--html", page, "--overwrite")[0] == 0
    assert page.read_text() != "mine"


def test_a_folder_without_an_adapter_is_a_failure_of_one_line(tmp_path, capsys):
    code, out, err = run(capsys, "inspect", tmp_path)
    assert (code, out) == (1, "")
    assert "no adapter_config.json" in err
    assert "Traceback" not in err


def test_a_rank_below_one_is_wrong_usage(adapters, capsys):
    assert run(capsys, "inspect", adapters["lora"], "--rank", 0)[0] == 2
