"""`hiplora factorize`: what it reads, what it fills, what it says."""

import importlib.metadata
import json
import shutil
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPT2Model

from hiplora import HipLoraConfig
from hiplora.cli import main as cli
from hiplora.errors import FactorError
from hiplora.spectral import FactorStore, cache, weight_fingerprint
from hiplora.tuner import hip_layers
from hiplora.tuner.factorize import Checkpoint, factorize
from tests.tiny import save_tiny, tiny_llama


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Folder of an empty factor store, used by everything in the test."""
    monkeypatch.setenv("HIPLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "factors"


@pytest.fixture
def run(capsys, monkeypatch, root):
    """Run the command line; return (exit status, standard output, standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hiplora", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def no_decomposition(monkeypatch):
    def forbidden(*args, name, **kwargs):
        raise AssertionError(f"{name} was decomposed again")

    return lambda: monkeypatch.setattr(cache, "truncated_svd", forbidden)


def gpt2(cls=GPT2LMHeadModel):
    torch.manual_seed(0)
    return cls(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=16))


def fill(model, config, **options):
    checkpoint = Checkpoint(str(model))
    return list(factorize(checkpoint, checkpoint.targets(config), FactorStore(must_write=True), **options))


def test_training_finds_every_factor_in_the_store(tiny_model_dir, run, no_decomposition):
    assert run("factorize", tiny_model_dir, "--rank", 8)[0] == 0
    no_decomposition()
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model = peft.get_peft_model(base, HipLoraConfig(preset="paper", principal_rank=8))
    assert len(list(hip_layers(model))) == 8


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["model.layers.1.self_attn.q_proj"]},
        {"target_modules": r".*layers\.1\..*_proj"},
        {"target_modules": ["v_proj"], "layers_to_transform": [1]},
        {"principal_rank_pattern": {"k_proj": 3, "layers.1.self_attn.q_proj": 5}},
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_factors_what_the_tuner_adapts_and_nothing_else(tmp_path, root, family, options, no_decomposition):
    if family == "gpt2":
        options = (
            {"target_modules": options.get("target_modules")}
            if options.get("target_modules")
            in (
                None,
                "all-linear",
            )
            else {"target_modules": ["c_attn"], "layers_to_transform": [0]}
        )
    model = tiny_llama() if family == "llama" else gpt2()
    model.save_pretrained(tmp_path / "model")
    config = {"principal_rank": 8, **options}
    done = fill(tmp_path / "model", HipLoraConfig(preset="paper", **config))
    no_decomposition()
    layers = dict(hip_layers(peft.get_peft_model(model, HipLoraConfig(preset="paper", **config))))
    assert sorted(layer.name for layer in done) == sorted(layer.name for layer in layers.values())
    ranks = {layer.name: layer.hiplora_sigma["default"].shape[0] for layer in layers.values()}
    assert {layer.name: layer.k for layer in done} == ranks
    assert len(list(root.rglob("*.safetensors"))) == len(layers)


def test_the_model_is_never_loaded(tiny_model_dir, root, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", forbidden)
    checkpoint = Checkpoint(str(tiny_model_dir))
    assert all(parameter.is_meta for parameter in checkpoint.skeleton.parameters())
    assert len(checkpoint.targets(HipLoraConfig(preset="paper", principal_rank=4))) == 8


def test_a_second_run_verifies_and_keeps_everything(tiny_model_dir, run, root):
    code, said, _ = run("factorize", tiny_model_dir, "--rank", 8, "--json")
    first = json.loads(said)
    assert code == 0
    assert not any(layer["reused"] for layer in first["layers"])
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.safetensors")}
    second = json.loads(run("factorize", tiny_model_dir, "--rank", 8, "--json")[1])
    assert [layer["reused"] for layer in second["layers"]] == [True] * 8
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.safetensors")} == before


def test_the_table_has_a_row_a_kind(tiny_model_dir, run, root):
    code, said, errors = run("factorize", tiny_model_dir, "--rank", 8)
    assert (code, errors) == (0, "")
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if line.startswith("│")
    ]
    assert [row[:3] for row in rows] == [
        ["q_proj", "2", "64×64"],
        ["k_proj", "2", "32×64"],
        ["v_proj", "2", "32×64"],
        ["o_proj", "2", "64×64"],
    ]


def test_the_json_says_what_is_on_disk(tiny_model_dir, run, root):
    record = json.loads(run("factorize", tiny_model_dir, "--rank", 8, "--tolerance", "1e-5", "--json")[1])
    files = list(root.rglob("*.safetensors"))
    assert sum(layer["size"] for layer in record["layers"]) == sum(file.stat().st_size for file in files)
    assert max(layer["residual"] for layer in record["layers"]) <= 1e-5
    assert record["provenance"]["libraries"]["torch"] == importlib.metadata.version("torch")


def test_a_damaged_entry_is_named_and_made_anew(tiny_model_dir, run, root):
    run("factorize", tiny_model_dir, "--rank", 8)
    victim = sorted(root.rglob("*.safetensors"))[0]
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-3] + b"xyz")
    with pytest.warns(UserWarning, match="cannot be read .* computing it again"):
        record = json.loads(run("factorize", tiny_model_dir, "--rank", 8, "--json")[1])
    assert sum(layer["reused"] for layer in record["layers"]) == 7
    assert victim.read_bytes() == whole


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_checkpoint_serves_a_float32_model(tmp_path, root, dtype, no_decomposition):
    save_tiny(tmp_path / "model", dtype=dtype)
    fill(tmp_path / "model", HipLoraConfig(preset="paper", principal_rank=8))
    no_decomposition()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    peft.get_peft_model(base, HipLoraConfig(preset="paper", principal_rank=8))


def test_dtype_serves_a_model_that_is_trained_in_another_precision(tiny_model_dir, run, no_decomposition):
    assert run("factorize", tiny_model_dir, "--rank", 8, "--dtype", "bfloat16")[0] == 0
    no_decomposition()
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    peft.get_peft_model(base, HipLoraConfig(preset="paper", principal_rank=8))


def test_a_sharded_checkpoint_is_read_shard_by_shard(tmp_path, root):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    checkpoint = Checkpoint(str(tmp_path / "model"))
    for target in checkpoint.targets(
        HipLoraConfig(preset="paper", principal_rank=8, target_modules="all-linear")
    ):
        assert torch.equal(checkpoint.read(target), model.get_submodule(target.name).weight)


def test_conv1d_weights_are_read_as_out_by_in(tmp_path, root):
    model = gpt2()
    model.save_pretrained(tmp_path / "model")
    done = {
        layer.name: layer
        for layer in fill(tmp_path / "model", HipLoraConfig(preset="paper", principal_rank=4))
    }
    assert done["transformer.h.0.attn.c_attn"].shape == (96, 32)
    checkpoint = Checkpoint(str(tmp_path / "model"))
    for target in checkpoint.targets(HipLoraConfig(preset="paper", principal_rank=4)):
        expected = model.get_submodule(target.name).weight.T
        assert weight_fingerprint(checkpoint.read(target)) == weight_fingerprint(expected)


def test_a_checkpoint_of_the_bare_backbone_is_understood(tmp_path, root):
    gpt2(GPT2Model).save_pretrained(tmp_path / "model")
    assert "h.0.attn.c_attn.weight" in load_file(tmp_path / "model" / "model.safetensors")
    assert len(fill(tmp_path / "model", HipLoraConfig(preset="paper", principal_rank=4))) == 4


class TestErrors:
    """Each names the thing and the way out, before anything is computed."""

    def check(self, run, root, code, message, *arguments):
        status, said, errors = run("factorize", *arguments)
        assert status == code
        assert said == ""
        assert message in errors
        assert "Traceback" not in errors
        assert not list(root.rglob("*.safetensors"))

    @pytest.fixture
    def copy(self, tiny_model_dir, tmp_path):
        return shutil.copytree(tiny_model_dir, tmp_path / "copy")

    def test_no_such_model(self, run, root, tmp_path):
        self.check(run, root, 2, f"model {tmp_path / 'none'}: cannot be read", tmp_path / "none")

    def test_no_safetensors(self, run, root, copy):
        torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
        (copy / "model.safetensors").unlink()
        self.check(run, root, 2, "no model.safetensors in it", copy)

    def test_a_truncated_checkpoint(self, run, root, copy):
        raw = (copy / "model.safetensors").read_bytes()
        (copy / "model.safetensors").write_bytes(raw[: len(raw) // 2])
        self.check(run, root, 2, f"{copy / 'model.safetensors'}: cannot be read", copy)

    def test_a_missing_shard(self, run, root, tmp_path):
        tiny_llama().save_pretrained(tmp_path / "model", max_shard_size="100KB")
        sorted((tmp_path / "model").glob("model-*.safetensors"))[1].unlink()
        self.check(run, root, 2, "model-00002-of", tmp_path / "model")

    def test_a_damaged_shard_index(self, run, root, tmp_path):
        tiny_llama().save_pretrained(tmp_path / "model", max_shard_size="100KB")
        (tmp_path / "model" / "model.safetensors.index.json").write_text("{")
        self.check(run, root, 2, "model.safetensors.index.json", tmp_path / "model")

    def test_a_checkpoint_of_another_shape(self, run, root, copy):
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 4}))
        message = "k_proj.weight has shape (32, 64), expected (64, 64) from config.json"
        self.check(run, root, 2, message, copy, "--rank", 4)

    def test_a_tensor_under_another_name(self, run, root, copy):
        tensors = load_file(copy / "model.safetensors")
        renamed = {name.replace("k_proj", "key"): tensor for name, tensor in tensors.items()}
        save_file(renamed, copy / "model.safetensors", {"format": "pt"})
        message = f"layer model.layers.0.self_attn.k_proj: model {copy} keeps no tensor"
        self.check(run, root, 2, message, copy, "--rank", 4)

    def test_a_quantised_model(self, run, root, copy):
        config = json.loads((copy / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        (copy / "config.json").write_text(json.dumps(config))
        self.check(run, root, 2, "its weights are quantised", copy)

    def test_a_rank_beyond_a_weight(self, run, root, tiny_model_dir):
        message = "layer model.layers.0.self_attn.k_proj: principal_rank 33 exceeds min(out, in) = 32"
        self.check(run, root, 1, message, tiny_model_dir, "--rank", 33)

    @pytest.mark.parametrize("targets", ["q_porj", "q_proj,(", "*"])
    def test_targets_that_match_nothing(self, run, root, tiny_model_dir, targets):
        self.check(run, root, 2, "target_modules", tiny_model_dir, "--rank", 4, "--target-modules", targets)

    def test_a_target_that_is_no_linear_layer(self, run, root, tiny_model_dir):
        self.check(run, root, 2, "LlamaMLP", tiny_model_dir, "--rank", 4, "--target-modules", "mlp")

    @pytest.mark.parametrize(
        "option", [["--tolerance", "-1"], ["--tolerance", "nan"], ["--device", "abacus"]]
    )
    def test_options_without_meaning(self, run, root, tiny_model_dir, option):
        self.check(run, root, 2, "", tiny_model_dir, *option)

    def test_nan_in_a_weight_names_the_layer(self, run, root, copy):
        tensors = load_file(copy / "model.safetensors")
        tensors["model.layers.1.self_attn.o_proj.weight"][3, 4] = float("nan")
        save_file(tensors, copy / "model.safetensors", {"format": "pt"})
        with pytest.raises(
            FactorError, match=r"layer model\.layers\.1\.self_attn\.o_proj: the weight has NaN"
        ):
            fill(copy, HipLoraConfig(preset="paper", principal_rank=4))


@pytest.mark.real_model
def test_the_example_of_the_help_page_runs(smollm2, run, root):
    from hiplora.cli.factorize import command

    (root.parent / "models").mkdir(parents=True)
    (root.parent / "models" / "smollm2-135m").symlink_to(smollm2)
    example = command.__doc__.split("Example:")[1].split()
    assert example[0] == "hiplora"
    code, said, _ = run(*example[1:], "--json")
    assert code == 0
    assert len(json.loads(said)["layers"]) == 120
    assert max(layer["residual"] for layer in json.loads(said)["layers"]) <= 1e-4
