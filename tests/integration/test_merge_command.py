import inspect
import json
import shlex
import shutil

import pytest
import torch

from hiplora.adapters import read_update
from hiplora.cli import merge as command
from hiplora.merge_check import drift_of_merge
from hiplora.merging import RULES, merge
from tests.commands import quietly
from tests.unit.adapters.samples import assert_is, base_model, weighted_sum


def merged(capsys, *arguments):
    return json.loads(quietly(capsys, "merge", *arguments, "--json"))


def test_the_example_of_the_help_runs(adapters, tmp_path, monkeypatch, capsys):
    lines = inspect.getdoc(command.command).splitlines()
    assert lines[-3] == "Example:"
    example = shlex.split(lines[-1])
    assert example[:2] == ["hiplora", "merge"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name, adapter in (("medicine", "one"), ("law", "lora")):
        (tmp_path / "runs" / name).symlink_to(adapters[adapter])
    assert "addition of 2 adapters" in quietly(capsys, *example[1:])
    expected = weighted_sum([read_update(adapters["one"]), read_update(adapters["lora"])], [1, 0.5])
    assert_is(read_update(tmp_path / "runs" / "both"), expected, rtol=1e-4)


def test_a_dense_rule_writes_a_model_and_says_how_it_was_made(adapters, tmp_path, capsys):
    parts = [adapters["one"], adapters["lora"], adapters["mlp"]]
    how = ["--method", "dare", "--weights", " 1, 0.5 ,2", "--set", "density=0.4"]
    record = merged(capsys, *parts, "--out", tmp_path / "out", *how)
    written = json.loads((tmp_path / "out" / "export.json").read_text())["merge"]
    for merge_record in (record, written):
        assert (merge_record["method"], merge_record["weights"]) == ("dare", [1.0, 0.5, 2.0])
        assert merge_record["options"] == RULES["dare"].defaults | {"density": 0.4}
    assert record["export"]["to"] == "dense"
    expected = merge(parts, "dare", (1, 0.5, 2), options={"density": 0.4})
    before, after = base_model(adapters.base), base_model(tmp_path / "out")
    for module in expected.modules:
        change = after.get_submodule(module).weight - before.get_submodule(module).weight
        torch.testing.assert_close(change, expected.delta(module), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", ["addition", "ties"])
def test_a_merge_is_cut_down_and_what_is_lost_is_said(adapters, tmp_path, capsys, method):
    parts = [adapters["one"], adapters["lora"]]
    how = [*parts, "--method", method, "--rank", 4]
    record = merged(capsys, *how, "--out", tmp_path / "out")
    assert (record["kind"], record["adapters"], record["export"]["to"]) == ("merge", list(map(str, parts)), "lora")
    assert set(read_update(tmp_path / "out").ranks.values()) == {4}
    losses = {entry["module"]: entry["relative_error"] for entry in record["truncation"]["modules"]}
    assert losses == pytest.approx(merge(parts, method, rank=4).errors)
    assert min(losses.values()) > 1e-3
    written = json.loads((tmp_path / "out" / "export.json").read_text())
    assert written["merge"]["truncation"] == record["truncation"]
    out = quietly(capsys, "merge", *how, "--out", tmp_path / "table")
    worst = record["truncation"]["modules"][0]
    assert all(said in out for said in ("Cut down to rank 4", f"{worst['relative_error']:.1%}", worst["module"]))


@pytest.mark.parametrize(
    ("name", "scale", "verdict"), [("one", 1e-3, "hardly disturb"), ("lora", 0.1, "change the same things")]
)
def test_an_adapter_merged_with_itself_breaks_nothing_new_and_one_alone_is_not_compared(
    adapters, name, scale, verdict
):
    update = read_update(adapters[name])
    assert drift_of_merge({name: update}, [1.0], update)["verdict"].endswith("of its top tokens change).")
    for times in (2, 3):
        same = {str(number): read_update(adapters[name]).scaled(scale) for number in range(times)}
        drift = drift_of_merge(same, [1.0] * times, merge(list(same.values())))
        assert verdict in drift["verdict"]
        assert ("no more than rounding" in drift["verdict"]) == (scale < 0.01)
    larger = merge(list(same.values())).scaled(1 / scale)
    assert "breaks what none" in drift_of_merge(same, [1.0] * times, larger)["verdict"]


def test_an_adapter_may_be_in_a_folder_called_merge(adapters, tmp_path, capsys):
    shutil.copytree(adapters["one"], tmp_path / "merge")
    there, here = (
        merged(capsys, one, adapters["two"], "--out", tmp_path / f"of {one.name}")["drift"]
        for one in (adapters["one"], tmp_path / "merge")
    )
    assert list(here["drift"].values()) == list(there["drift"].values())


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_a_scaled_merge_is_compared_with_adapters_of_the_same_scale(adapters, tmp_path, capsys, scale):
    parts = [adapters["one"], adapters["two"]]
    by_scale = merged(capsys, *parts, "--scale", scale, "--out", tmp_path / "scaled")["drift"]
    by_weights = merged(capsys, *parts, "--weights", f"{scale},{scale}", "--out", tmp_path / "weighted")["drift"]
    for name, texts in by_weights["drift"].items():
        for text, drift in texts.items():
            assert by_scale["drift"][name][text]["kl"] == pytest.approx(drift["kl"], rel=1e-3)


def test_the_page_of_adapters_that_do_not_meet_says_so(adapters, tmp_path, capsys):
    page = tmp_path / "page.html"
    merged(capsys, adapters["one"], adapters["mlp"], "--out", tmp_path / "out", "--no-drift", "--html", page)
    assert "No module is changed by two adapters." in page.read_text()
    assert "Modules that conflict most" not in page.read_text()
