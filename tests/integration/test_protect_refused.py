"""What `hiplora protect` cannot work with: said in a line, before anything is written."""

import pytest
from peft import LoraConfig

from hiplora import protect as protection
from hiplora.adapters import read_update
from hiplora.cli.main import main
from tests.tiny import save_tiny, write_jsonl
from tests.unit.adapters.samples import ATTENTION, base_model, edit_tensors, hip_config, leaky, saved


@pytest.fixture(scope="session")
def adapters(tiny_model_dir, tmp_path_factory):
    """Folders of trained adapters of one base model."""
    root = tmp_path_factory.mktemp("refused")
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=[*ATTENTION, "down_proj"])
    configs = {"lora": lora, "hiplora": hip_config()}
    return {name: saved(tiny_model_dir, root / name, config)[0] for name, config in configs.items()}


@pytest.fixture
def files(tmp_path):
    (tmp_path / "text.txt").write_text("A ship is a home that moves, said the keeper of the light. " * 20)
    return tmp_path


def refused(capsys, files, *arguments):
    """Exit status and message of a command that must write nothing."""
    before = sorted(path.name for path in files.iterdir())
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["protect", *map(str, arguments)])
    out, err = capsys.readouterr()
    code = stop.value.code or 0
    assert out == ""
    assert "Traceback" not in err
    assert sorted(path.name for path in files.iterdir()) == before
    return code, err


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--strength", "1.5"], "strength"),
        (["--strength", "nan"], "strength"),
        (["--projection", "medium"], "projection"),
        (["--principal-rank", "0"], "principal_rank is 0"),
        (["--principal-rank", "many"], "principal_rank is 'many'"),
        (["--principal-rank", "100"], "layers.0.mlp.down_proj: principal_rank 100 exceeds the 96"),
        (["--principal-rank", "80"], "layers.0.self_attn.k_proj: principal_rank 80 exceeds the 64"),
        (["--text", "none.txt"], "none.txt: cannot be read"),
        (["--text", "empty.txt"], "empty.txt: is empty"),
        (["--drift-text", "none.txt"], "--drift-text none.txt: cannot be read"),
        (["--drift-text", "empty.txt"], "--drift-text empty.txt: is empty"),
        (["--data", "none.jsonl"], "none.jsonl: no such file"),
        (["--data", "empty.jsonl"], "empty.jsonl: is empty"),
        (["--data", "wrong.jsonl"], "wrong.jsonl"),
        (["--tokens", "1"], "tokens"),
        (["--out", "there"], "--overwrite"),
    ],
)
def test_wrong_usage_is_status_2_and_writes_nothing(adapters, files, monkeypatch, capsys, arguments, why):
    monkeypatch.chdir(files)
    monkeypatch.setattr(
        protection, "load_base", lambda *a: pytest.fail("the model was loaded before the checks")
    )
    (files / "there").mkdir()
    (files / "empty.txt").touch()
    (files / "empty.jsonl").touch()
    write_jsonl(files / "wrong.jsonl", [{"nothing": "useful"}])
    code, err = refused(capsys, files, adapters["lora"], "--out", "out", *arguments)
    assert code == 2
    assert why in " ".join(err.split())


def test_what_is_no_adapter_or_leaks_is_a_failure_of_one_line(tiny_model_dir, files, capsys):
    code, err = refused(capsys, files, files, "--out", files / "out")
    assert (code, "no adapter_config.json" in err) == (1, True)
    folder, module = leaky(tiny_model_dir, files / "leaky")
    code, err = refused(capsys, files, folder, "--out", files / "out")
    assert (code, f"{module} leaks" in err) == (1, True)


def test_another_base_is_refused_by_weights_or_shapes(adapters, files, capsys):
    other = save_tiny(files / "other", seed=1)
    code, err = refused(capsys, files, adapters["hiplora"], "--out", files / "out", "--base", other)
    assert (code, "not the one that this adapter was made for" in err) == (1, True)


def test_an_adapter_that_does_nothing_is_refused(tiny_model_dir, files, capsys):
    folder, _ = saved(tiny_model_dir, files / "idle", LoraConfig(target_modules=["q_proj"]))
    edit_tensors(folder, lambda tensors: [t.zero_() for name, t in tensors.items() if "lora_B" in name])
    code, err = refused(
        capsys, files, folder, "--out", files / "out", "--text", files / "text.txt", "--tokens", 300
    )
    assert (code, "changes no logit on any text" in err) == (1, True)


def test_a_base_without_a_tokenizer_is_refused_with_the_reason(adapters, tiny_model_dir, files, capsys):
    base_model(tiny_model_dir).save_pretrained(files / "bare")
    code, err = refused(capsys, files, adapters["lora"], "--out", files / "out", "--base", files / "bare")
    assert code == 2
    assert "has no tokenizer that can be loaded" in err


def test_the_adapter_itself_is_never_replaced(adapters, files, capsys):
    code, err = refused(capsys, files, adapters["lora"], "--out", adapters["lora"], "--overwrite")
    assert (code, "delete the adapter" in err) == (2, True)
    assert read_update(adapters["lora"]).kind == "lora"


def test_the_base_model_is_never_replaced(files, capsys):
    base = save_tiny(files / "base")
    folder, _ = saved(base, files / "a", LoraConfig(target_modules=["q_proj"]))
    code, err = refused(capsys, files, folder, "--out", base, "--overwrite")
    assert (code, "delete its base model" in err) == (2, True)
    assert base_model(base) is not None
