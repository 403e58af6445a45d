import inspect
import json
import shlex

import pytest
import torch
from peft import LoraConfig, PeftModel

from hiplora.adapters import read_update
from hiplora.cli import merge as command
from hiplora.merging import RULES, merge
from tests.commands import run
from tests.tiny import save_tiny
from tests.unit.adapters.samples import ATTENTION, base_model, hip_config, logits, product, saved

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="session")
def adapters(tiny_model_dir, tmp_path_factory):
    """Folders of adapters of one base model, trained apart."""
    root = tmp_path_factory.mktemp("merged")
    configs = {
        "one": hip_config(),
        "two": hip_config(),
        "lora": LoraConfig(r=3, lora_alpha=9, target_modules=ATTENTION),
        "mlp": LoraConfig(r=2, target_modules=["up_proj"]),
    }
    return {
        name: saved(tiny_model_dir, root / name, config, seed=i)[0] for i, (name, config) in enumerate(configs.items())
    }


def merged(capsys, *arguments):
    code, out, err = run(capsys, "merge", *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def assert_is_sum(folder, terms):
    found, expected = read_update(folder), {}
    for weight, part in terms:
        update = read_update(part)
        for module in update.factors:
            expected[module] = expected.get(module, 0) + weight * product(update, module)
    assert set(found.factors) == set(expected)
    for module, delta in expected.items():
        torch.testing.assert_close(product(found, module), delta, rtol=1e-4, atol=1e-6)


def test_the_example_of_the_help_runs(adapters, tmp_path, monkeypatch, capsys):
    lines = inspect.getdoc(command.command).splitlines()
    assert lines[-3] == "Example:"
    example = shlex.split(lines[-1])
    assert example[:2] == ["hiplora", "merge"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name, adapter in (("medicine", "one"), ("law", "lora")):
        (tmp_path / "runs" / name).symlink_to(adapters[adapter])
    code, out, err = run(capsys, *example[1:])
    assert (code, err) == (0, "")
    assert "addition of 2 adapters" in out
    assert_is_sum(tmp_path / "runs" / "both", [(1, adapters["one"]), (0.5, adapters["lora"])])


@pytest.mark.parametrize(("weights", "numbers"), [([], [1, 1, 1]), (["--weights", " 1, 0 ,-0.5"], [1, 0, -0.5])])
def test_lora_is_the_weighted_sum_and_loads_in_stock_peft(
    adapters, tiny_model_dir, tmp_path, capsys, weights, numbers
):
    parts = [adapters[name] for name in ("one", "two", "mlp")]
    record = merged(capsys, *parts, "--out", tmp_path / "out", *weights)
    assert_is_sum(tmp_path / "out", list(zip(numbers, parts, strict=True)))
    assert (record["kind"], record["method"], record["export"]["to"]) == ("merge", "addition", "lora")
    assert record["adapters"] == list(map(str, parts))
    assert record["export"]["logit_difference"] < 1e-5
    model = PeftModel.from_pretrained(base_model(tiny_model_dir), tmp_path / "out").eval()
    assert (logits(model) - logits(base_model(tiny_model_dir))).abs().max() > 1e-2


def test_a_dense_rule_writes_a_model_and_says_how_it_was_made(adapters, tiny_model_dir, tmp_path, capsys):
    parts, method = [adapters["one"], adapters["lora"], adapters["mlp"]], "dare"
    how = ["--method", method, "--weights", "1,0.5,2", "--set", "density=0.4"]
    record = merged(capsys, *parts, "--out", tmp_path / "out", *how)
    assert (record["method"], record["weights"]) == (method, [1.0, 0.5, 2.0])
    assert record["options"] == RULES[method].defaults | {"density": 0.4}
    assert record["export"]["to"] == "dense"
    expected = merge(parts, method, (1, 0.5, 2), options={"density": 0.4})
    before, after = base_model(tiny_model_dir), base_model(tmp_path / "out")
    for module in expected.modules:
        change = after.get_submodule(module).weight - before.get_submodule(module).weight
        torch.testing.assert_close(change, expected.delta(module), rtol=1e-3, atol=1e-6)
    written = json.loads((tmp_path / "out" / "export.json").read_text())["merge"]
    assert (written["method"], written["options"]["density"], written["weights"]) == (method, 0.4, [1.0, 0.5, 2.0])


@pytest.mark.parametrize("method", ["addition", "ties"])
def test_a_merge_is_cut_down_and_what_is_lost_is_said(adapters, tmp_path, capsys, method):
    parts = [adapters["one"], adapters["lora"]]
    how = [*parts, "--method", method, "--rank", 4]
    record = merged(capsys, *how, "--out", tmp_path / "out")
    assert record["export"]["to"] == "lora"
    assert set(read_update(tmp_path / "out").ranks.values()) == {4}
    losses = {entry["module"]: entry["relative_error"] for entry in record["truncation"]["modules"]}
    assert losses == pytest.approx(merge(parts, method, rank=4).errors)
    assert min(losses.values()) > 1e-3
    written = json.loads((tmp_path / "out" / "export.json").read_text())
    assert written["merge"]["truncation"] == record["truncation"]
    code, out, err = run(capsys, "merge", *how, "--out", tmp_path / "table")
    assert (code, err) == (0, "")
    assert "Cut down to rank 4" in out
    worst = record["truncation"]["modules"][0]
    assert f"{worst['relative_error']:.2e}" in out
    assert worst["module"] in out


def refused(capsys, folder, *arguments):
    """Exit status and message of a command that must write nothing."""
    before = sorted(path.name for path in folder.iterdir())
    code, out, err = run(capsys, "merge", *arguments)
    assert out == ""
    assert "Traceback" not in err
    assert sorted(path.name for path in folder.iterdir()) == before
    return code, " ".join(err.split())


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--method", "average"], "'average' is not known; expected one of addition"),
        (
            ["--method", "ties", "--format", "lora"],
            "pass --rank, for example --rank 64, to keep the strongest directions",
        ),
        (["--method", "ties", "--format", "hiplora"], "ties keeps no gains apart, only addition does"),
        (["--method", "ties", "--set", "seed=1"], "'ties' has no option 'seed'; its options: density, scale"),
        (["--method", "ties", "--set", "density"], "--set density: expected name=value"),
        (["--weights", "1,x"], "--weights 1,x: expected numbers"),
        (["--format", "gguf"], "gguf"),
        (["--out", "there"], "--overwrite"),
    ],
)
def test_wrong_usage_is_status_2_and_writes_nothing(adapters, tmp_path, monkeypatch, capsys, arguments, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    code, err = refused(capsys, tmp_path, adapters["one"], adapters["lora"], "--out", "out", *arguments)
    assert code == 2
    assert why in err


@pytest.mark.parametrize("form", ["lora", "dense", "hiplora"])
def test_neither_an_adapter_nor_the_base_model_is_ever_replaced(tmp_path, capsys, form):
    base = save_tiny(tmp_path / "base")
    folder, _ = saved(base, tmp_path / "a", hip_config())
    for out, why in ((base, "delete its base model"), (folder, "delete adapter 1")):
        code, err = refused(capsys, tmp_path, folder, "--out", out, "--overwrite", "--format", form)
        assert (code, why in err) == (2, True)
    assert base_model(base) is not None
    assert read_update(folder).kind == "hiplora"
