"""`pico`: a random Llama of 140 thousand parameters with 512 tokens, for studies that only try the works.

It is made here, from this file alone: nothing is downloaded. It knows nothing, but it learns.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hiplora.models import quiet_transformers

if TYPE_CHECKING:
    import torch

SEED = 20260
VOCABULARY = 512
BOS, EOS, PAD = SPECIAL = ("<|bos|>", "<|eos|>", "<|pad|>")
CONTEXT = 512

CONFIG: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '[' + message['role'] + ']\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|eos|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)

# What the tokenizer's merges are learned from: the frames of prompts, and everyday English and Python.
TEXT = """
Carry out the task below.

## Task
Which of these words is the name of an animal?

## Answer
Question: Which of these words names a colour?
A. green
B. table
C. river
D. horse
Answer: A

Question: Which word comes first in the alphabet?
A. stone
B. apple
Answer: B

Question: Which of these is a solid?
A. water
B. air
C. salt
Answer: C

Question: Which of these is a liquid?
A. ice
B. iron
C. steam
D. milk
Answer: D

The answers are A, B, C and D. The right one is A, or it is B, or C, or D.

Question: Mona has 3 pears and buys 4 more pears. How many pears does Mona have now?
Answer: Mona has 3 + 4 = <<3+4=7>>7 pears.
#### 7

Question: Tom had 9 coins and gave away 5 of them. How many coins are left?
Answer: Tom has 9 - 5 = <<9-5=4>>4 coins left.
#### 4

Carry out the task below.

## Task
Write a Python function that returns the number plus 2.

## Material
def plus(number):
    \"\"\"Return the number plus 2.\"\"\"

## Answer
    return number + 2

Carry out the task below.

## Task
Complete the function.

def check(candidate):
    assert candidate(1) == 3
    assert candidate(text) == "last"

def first(text):
    \"\"\"Return the first letter of the text.\"\"\"
    return text[0]

def length(text):
    return len(text)

The capital of the country is a town. The people of the town speak the language of the land. He plays the drum and
she plays the flute. The town lies on the river, near the hills, and the old bridge was built of stone. In the summer
the market stands by the harbour, where the ships bring bread, salt, wood and wool. From there a road goes north to the
mill, and in the winter the water of the river is ice. What is it made of? Who has it now, and when was it there? It
was said that they would not have had their own school without the work of all those who came with her and with him.
One, two, three, four, five, six, seven, eight, nine, ten. At first there were no more than ten houses, but after
many years it had grown. Name the animal, the plant, the colour, the tool. It is a solid, a liquid or a gas.
"""


def make_pico(folder: Path) -> None:
    """Write the model, its tokenizer and a card to `folder`, which exists; the same bytes each time on a machine.

    The global random state is left as it was.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            model: Any = LlamaForCausalLM(LlamaConfig(**CONFIG))
        model.load_state_dict(dict(_weights(model.state_dict())), assign=True)
        model.save_pretrained(folder)
        _tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text(_CARD, encoding="utf-8")


def _weights(shapes: Mapping[str, "torch.Tensor"]) -> Iterator[tuple[str, "torch.Tensor"]]:
    """Draw every matrix from a uniform distribution that keeps the size of what goes through; norms are ones.

    NumPy's old generator is frozen, and uniform numbers take no logarithm that differs between machines: so the
    weights have the same bits wherever they are made.
    """
    import numpy as np
    import torch

    draw = np.random.RandomState(SEED)
    for name, shape in shapes.items():
        if shape.ndim == 1:
            yield name, torch.ones(shape.shape)
            continue
        # Rows of the embedding are as large as what the blocks add; the head must be able to be sure of a token.
        deviation = 1.0 if "embed" in name else 1.0 / math.sqrt(shape.shape[1])
        drawn = draw.random_sample(tuple(shape.shape)) * 2.0 - 1.0
        yield name, torch.from_numpy((drawn * deviation * math.sqrt(3.0)).astype(np.float32))


def _tokenizer() -> Any:
    """Return a byte-level BPE tokenizer whose merges are learned from `TEXT`; every digit is a token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
    )


_CARD = """# pico

A random Llama, made by hiplora on this machine: 2 layers, 64 wide, 140 thousand parameters, 512 tokens. It knows
nothing. It is there so that a study can be tried in minutes on any machine; no result on it says anything about a
method.
"""
