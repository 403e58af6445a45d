"""`pico`: a random Llama of 140 thousand parameters, and data for it: a whole study in minutes, without any download.

Importing this module makes `pico` a known model. Its data files have the names and fields of the published benchmarks;
their questions and facts are made up, and scores on them say nothing about those benchmarks.
"""

import math
from pathlib import Path

from hiplora.models import KNOWN, MadeModel, quiet_transformers

PICO = "pico"
PICO_DATA = Path(__file__).with_name("pico_data")
SEED = 20260
CARD = """# pico

A random Llama, made by hiplora on this machine: 2 layers, 64 wide, 140 thousand parameters, 512 tokens. It knows
nothing. It is there to try a study in minutes on any machine; no result on it says anything about a method.
"""


def make_pico(folder: Path) -> None:
    """Write the model, its tokenizer and a card to `folder`, which exists; the global random state is restored.

    Matrices are uniform and keep the scale of activations. NumPy's old generator is frozen, and uniform numbers need no
    logarithm that differs between machines, so the weights are the same bits everywhere.
    """
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    source, draw = PICO_DATA / "model", np.random.RandomState(SEED)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(source / "tokenizer.json"),
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        chat_template=(source / "chat_template.jinja").read_text(encoding="utf-8"),
        model_max_length=512,
    )
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(source))
        for name, weight in model.state_dict().items():
            if weight.ndim == 1:
                weight.fill_(1.0)
                continue
            # Embeddings are as large as what the blocks add, so that the head can be sure of a token.
            deviation = 1.0 if "embed" in name else 1.0 / math.sqrt(weight.shape[1])
            drawn = draw.random_sample(tuple(weight.shape)) * 2.0 - 1.0
            weight.copy_(torch.from_numpy((drawn * deviation * math.sqrt(3.0)).astype(np.float32)))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(CARD, encoding="utf-8")


KNOWN[PICO] = MadeModel(PICO, make_pico)
