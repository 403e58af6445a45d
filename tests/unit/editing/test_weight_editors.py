"""AlphaEdit and CrispEdit on decoders that are no Llamas."""

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hiplora.editing import AlphaEdit, AlphaEditor, CrispEdit, CrispEditor, EditTraining
from hiplora.errors import ConfigError
from hiplora.tuner import input_bases
from tests.tiny import VOCABULARY, tiny_mixture, tiny_tokenizer
from tests.unit.editing.samples import EDITS

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4},
    "gptj": {"n_embd": 64, "n_layer": 4, "n_head": 4, "rotary_dim": 8},
    "opt": {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 4, "num_attention_heads": 4},
    "recurrent_gemma": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "lru_width": 64}
    | {"num_attention_heads": 4, "num_key_value_heads": 1},
}
EDITED = {
    "gpt2": ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"],  # a Conv1D
    "gptj": ["transformer.h.0.mlp.fc_out", "transformer.h.1.mlp.fc_out"],
    "opt": ["model.decoder.layers.0.fc2", "model.decoder.layers.1.fc2"],  # in no MLP, which gets all rows as one
    "recurrent_gemma": ["model.layers.0.mlp_block.down_proj", "model.layers.1.mlp_block.down_proj"],  # reads padding
}


@pytest.fixture(params=SIZES)
def decoder(request):
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 256, "eos_token_id": 257, "word_embed_proj_dim": 64}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **tokens, **SIZES[request.param]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    return request.param, model.eval()


@pytest.mark.parametrize("method", ["alphaedit", "crispedit"])
def test_the_last_layers_of_the_mlps_are_edited_saved_as_a_lora_and_put_back(decoder, method, tmp_path):
    kind, model = decoder
    base = {name: values.clone() for name, values in model.state_dict().items()}
    ids = torch.arange(9)[None]
    if method == "alphaedit":
        first = EDITED[kind][0]
        threshold = input_bases(model, [first], tokens=400)[first].values.median().item()
        settings = AlphaEdit(threshold=threshold, ridge=1e-3, calibration_tokens=400, value_steps=12, prefixes=1)
        editor = AlphaEditor(model, tiny_tokenizer(), settings)
        assert max(editor.teach(EDITS[:3])["value_error"]) < 0.5
    else:
        editor = CrispEditor(
            model, tiny_tokenizer(), CrispEdit(calibration_tokens=400), EditTraining(steps=6, lr=5e-2)
        )
        losses = editor.teach(EDITS[:3])["loss"]
        assert losses[-1] < losses[0] - 1
    assert editor.modules == EDITED[kind]
    with torch.no_grad():
        edited = model(ids).logits
    editor.save(tmp_path / "adapter", "base")
    editor.close()
    assert list(model.state_dict()) == list(base)
    assert all(torch.equal(values, base[name]) for name, values in model.state_dict().items())
    with torch.no_grad():
        saved = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()(ids).logits
    assert (saved - edited).abs().max() < 1e-4 * edited.abs().max()


def test_a_model_without_dense_mlps_is_refused():
    with pytest.raises(ConfigError, match="MixtralForCausalLM has 0 of the two"):
        CrispEditor(tiny_mixture(), tiny_tokenizer(), CrispEdit(), EditTraining())
