import peft
import pytest
import torch

from hiplora.adapters import AdapterUpdate
from hiplora.errors import AdapterError, ConfigError
from hiplora.evaluation.answers import changes, chat_prompt, continuations, side_by_side
from hiplora.evaluation.mounting import (
    applied,
    check_acts,
    check_adapters,
    load_model,
    mounted,
    name_adapters,
)
from tests.tiny import save_tiny, tiny_llama, tiny_tokenizer

IDS = torch.arange(1, 20)[None]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits[0]


def lora_folder(path, targets=("q_proj",), **options):
    model = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False, **options)
    )
    model.save_pretrained(path)
    return path


def change_of(matrices):
    """An update of given matrices (m, n)."""
    factors = {name: (torch.eye(matrix.shape[1]), matrix) for name, matrix in matrices.items()}
    return AdapterUpdate("the base", "lora", {}, factors)


def test_an_adapter_acts_while_it_is_mounted_and_leaves_the_bare_model(tmp_path):
    model, folder = tiny_llama(), lora_folder(tmp_path)
    before = logits(model)
    with mounted(model, folder) as adapted:
        assert not torch.equal(logits(adapted), before)
    assert torch.equal(logits(model), before)
    assert not hasattr(model, "peft_config")


def test_an_adapter_of_another_model_is_refused_by_name(tmp_path):
    folder = lora_folder(tmp_path, targets=["q_proj"])
    weights = peft.utils.save_and_load.safe_load_file(folder / "adapter_model.safetensors")
    from safetensors.torch import save_file

    save_file(
        {name: tensor[..., :3].contiguous() for name, tensor in weights.items()}, folder / "adapter_model.safetensors"
    )
    with pytest.raises(AdapterError, match=str(tmp_path)), mounted(tiny_llama(), folder):
        pass


def test_an_update_is_added_and_the_very_same_weights_come_back():
    model = tiny_llama()
    name = "model.layers.0.mlp.up_proj"
    weight, before = model.get_submodule(name).weight, logits(model)
    change = torch.randn(weight.shape)
    with applied(model, change_of({name: change})) as changed:
        assert torch.equal(model.get_submodule(name).weight, weight + change)
        assert not torch.equal(logits(changed), before)
    assert model.get_submodule(name).weight is weight
    assert torch.equal(logits(model), before)


def test_a_tied_output_head_leaves_the_embeddings_alone():
    model = tiny_llama(tie=True)
    embedded = model.get_input_embeddings().weight.clone()
    change = torch.ones_like(embedded)
    with applied(model, change_of({"lm_head": change})):
        assert torch.equal(model.get_input_embeddings().weight, embedded)
        assert torch.equal(model.lm_head.weight, embedded + change)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_weights_come_back_after_an_error():
    model = tiny_llama()
    before = logits(model)
    good, bad = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
    matrices = {good: torch.ones(96, 64), bad: torch.ones(3, 3)}
    with pytest.raises(AdapterError, match=bad), applied(model, change_of(matrices)):
        pass
    assert torch.equal(logits(model), before)


def test_pissa_that_was_not_converted_is_caught(tmp_path):
    """Loaded anew, it subtracts its start from the base weights, which then are not the base's any more."""
    model = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    )
    model.save_pretrained(tmp_path)
    bare = tiny_llama()
    base = logits(bare)
    with mounted(bare, tmp_path) as adapted:
        on = logits(adapted)
        with adapted.disable_adapter(), pytest.raises(AdapterError, match="bit for bit"):
            check_acts(base, on, logits(adapted), "pissa")


def test_a_loaded_model_scores_the_same_bits_before_an_adapter_and_after_one(tmp_path):
    model, tokenizer = load_model(str(save_tiny(tmp_path / "base")))
    before = logits(model)
    check_adapters(model, tokenizer, ["a prompt", ""], {"lora": lora_folder(tmp_path / "lora")})
    assert torch.equal(logits(model), before)


@pytest.fixture
def folders(tmp_path):
    for name in ("a/maths", "b/maths", "x=y"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "adapter_config.json").write_text("{}")
    return tmp_path


def names(*given):
    return list(name_adapters(given))


def test_a_folder_is_called_by_its_own_name_or_by_the_given_one(folders):
    maths = folders / "a/maths"
    assert names(maths, f"law={folders / 'b/maths'}") == ["maths", "law"]
    assert names(str(folders / "x=y"), f"gsm8k={maths}") == ["x=y", "gsm8k"]


def test_a_taken_name_and_a_folder_without_an_adapter_are_refused(folders):
    for given in ((f"base={folders / 'a/maths'}",), (folders / "a/maths", folders / "b/maths")):
        with pytest.raises(ConfigError, match="is taken"):
            names(*given)
    with pytest.raises(ConfigError, match=r"holds no adapter_config\.json"):
        names(folders / "a")
    with pytest.raises(ConfigError, match="no such folder"):
        names("one=nowhere")


def test_answers_are_greedy_and_do_not_depend_on_the_batch():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    prompts = ["In the summer", "A", "the market stands by"]
    alone = [continuations(model, tokenizer, [prompt], 8)[0] for prompt in prompts]
    assert continuations(model, tokenizer, prompts, 8, batch_size=2) == alone
    ids = tokenizer(prompts[0])["input_ids"]
    for _ in range(8):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert alone[0] == tokenizer.decode(ids, skip_special_tokens=True).removeprefix(prompts[0])


def test_answers_stand_side_by_side_and_the_base_is_bare_again(tmp_path):
    model, tokenizer, folder = tiny_llama(), tiny_tokenizer(), lora_folder(tmp_path)
    prompts = ["In the summer", "A"]
    found = side_by_side(model, tokenizer, {"lora": folder}, prompts, 6)
    assert [row["base"] for row in found] == continuations(model, tokenizer, prompts, 6)
    with mounted(model, folder) as adapted:
        assert [row["lora"] for row in found] == continuations(adapted, tokenizer, prompts, 6)
    apart = side_by_side(model, tokenizer, {"lora": folder}, {"base": ["A"], "lora": ["In the summer"]}, 6)
    assert apart == [{"base": found[1]["base"], "lora": found[0]["lora"]}]


@pytest.mark.parametrize(
    ("base", "other", "marked"),
    [
        ("Berlin is the capital.", "Berlin is a capital.", [" a"]),
        ("the same words", "the same words", []),
        ("", " new words", [" new words"]),
        ("one two", "one two three\n", [" three\n"]),
    ],
)
def test_changes_are_runs_of_words_and_joined_they_are_the_text(base, other, marked):
    found = changes(base, other)
    assert "".join(text for text, _ in found) == other
    assert [text for text, changed in found if changed] == marked


def test_a_chat_prompt_is_the_templates_or_the_words_themselves_and_begins_once():
    tokenizer = tiny_tokenizer()
    asked = [{"role": "user", "content": "Why?"}]
    assert chat_prompt(tokenizer, asked) == "[user]\nWhy?\n[assistant]\n"
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert chat_prompt(tokenizer, asked).startswith("<|bos|>")  # this tokenizer adds none itself
    tokenizer.chat_template = None
    assert chat_prompt(tokenizer, asked) == "Why?"
