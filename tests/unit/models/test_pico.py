"""`pico` is made here, whole and the same each time, by however many ask for it; and it can learn."""

import hashlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from hiplora.errors import ConfigError
from hiplora.models import KNOWN, MANIFEST, MadeModel, fetch, load, model_dir, resolve
from hiplora.models import __main__ as command
from hiplora.models.pico import CONTEXT, make_pico
from hiplora.models.shapes import model_shape, shape_of

WEIGHTS = (
    "6ceedeafc404a55c8358e6220fec5eae4d1d07f4130701b65a50215f46be3850"  # SHA-256, in the order of their names
)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HIPLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def pico():
    return load("pico")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}


def process(code: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def write_note(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def fail_halfway(folder: Path) -> None:
    write_note(folder)
    raise OSError(28, "No space left on device")


def test_it_is_made_into_the_cache_on_first_use_and_taken_from_there_afterwards(cache, monkeypatch):
    folder = Path(resolve("pico"))
    assert folder == model_dir("pico")
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert resolve("pico") == str(folder)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == times


def test_several_processes_that_ask_at_once_get_one_folder_with_the_same_bytes_as_any_other(cache, tmp_path):
    code = "from hiplora.models import fetch; print(fetch('pico'))"
    asked = [process(code, PYTHONHASHSEED=seed) for seed in ("1", "2")]
    answers = [run.communicate(timeout=120) for run in asked]
    assert [run.returncode for run in asked] == [0, 0], answers
    assert {out.strip() for out, _ in answers} == {str(model_dir("pico"))}
    assert sorted(path.name for path in model_dir("pico").parent.iterdir()) == [".pico.lock", "pico"]
    (tmp_path / "again").mkdir()
    make_pico(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(model_dir("pico"))


def test_its_weights_have_the_same_bits_on_every_machine(pico):
    digest = hashlib.sha256()
    for _, weight in sorted(pico[0].state_dict().items()):
        digest.update(weight.numpy().tobytes())
    assert digest.hexdigest() == WEIGHTS


def test_making_it_leaves_the_random_state_alone(tmp_path):
    before = torch.random.get_rng_state()
    make_pico(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_failure_halfway_leaves_nothing(cache, monkeypatch):
    monkeypatch.setitem(KNOWN, "pico", MadeModel("pico", fail_halfway))
    with pytest.raises(OSError, match="No space left"):
        fetch("pico")
    assert [path.name for path in model_dir("pico").parent.iterdir()] == [".pico.lock"]


def test_a_folder_that_another_version_made_is_made_anew(cache, monkeypatch, caplog):
    with monkeypatch.context() as other_version:
        other_version.setitem(KNOWN, "pico", MadeModel("pico", write_note))
        assert (fetch("pico") / "config.json").read_text() == "{}"
    assert "LlamaForCausalLM" in (fetch("pico") / "config.json").read_text()
    assert "it was made by another version of hiplora; making it anew" in caplog.text


def test_there_is_no_file_to_make_it_from(cache, capsys):
    with pytest.raises(ConfigError, match=r"model pico: is made on this machine .*--from pico\.gguf"):
        fetch("pico", source=Path("pico.gguf"))
    assert command.main(["pico", "--from", "pico.gguf"]) == 2
    assert command.main(["pico"]) == 0
    assert capsys.readouterr().out.strip() == str(model_dir("pico"))


def test_it_is_a_small_llama_with_grouped_queries_and_a_head_of_its_own(pico):
    model, tokenizer = pico
    assert model.config.num_attention_heads == 2 * model.config.num_key_value_heads
    assert not model.config.tie_word_embeddings
    assert model.num_parameters() < 150_000
    assert len(tokenizer) == model.config.vocab_size <= 512
    assert tokenizer.model_max_length == model.config.max_position_embeddings == CONTEXT
    ids = [model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id]
    assert ids == [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]


@pytest.mark.parametrize(
    "text", ["def f(x):\n    return x + 12\n", " Ünïcödé, \t\n\n  漢字 🙂", "#### 1,234"]
)
def test_its_tokenizer_gives_any_text_back(pico, text):
    tokenizer = pico[1]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_its_shape_is_known_without_making_it(pico, cache):
    assert model_shape("pico") == shape_of(pico[0].config)
    assert not model_dir("pico").exists()


def test_digits_and_the_letters_of_choices_are_one_token_each(pico):
    tokenizer = pico[1]
    assert [tokenizer.decode([i]) for i in tokenizer("12345")["input_ids"]] == list("12345")
    for letter in "ABCD":
        assert tokenizer.decode(tokenizer(f"Answer: {letter}")["input_ids"][-1:]) == f" {letter}"


def test_its_chat_template_marks_what_the_assistant_says(pico):
    tokenizer = pico[1]
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
    encoded = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    assert tokenizer.decode([i for i, said in pairs if said]) == "Good day<|eos|>"


def test_it_learns_a_text_by_heart(pico):
    model, tokenizer = load("pico")
    ids = tokenizer("The town lies on the river, near the hills.", return_tensors="pt")["input_ids"]
    optimizer = torch.optim.Adam(model.model.layers.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 5.5
    assert losses[-1] < 0.5
