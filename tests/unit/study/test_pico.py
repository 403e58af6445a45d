"""The smallest model and its data: the same bits everywhere."""

import hashlib

from hiplora.models import load
from hiplora.study.pico import PICO_DATA

WEIGHTS = "6ceedeafc404a55c8358e6220fec5eae4d1d07f4130701b65a50215f46be3850"  # in the order of their names
DATA = "9919e0020c8bec9a"


def test_the_weights_are_the_same_bits_everywhere():
    digest = hashlib.sha256()
    model, tokenizer = load("pico")
    for _, tensor in sorted(model.state_dict().items()):
        digest.update(tensor.numpy().tobytes())
    assert digest.hexdigest() == WEIGHTS
    assert len(tokenizer) == 512
    assert tokenizer.decode(tokenizer("Mona has 12 pears.")["input_ids"]) == "Mona has 12 pears."


def test_the_data_stay_what_published_records_were_made_of():
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(PICO_DATA.glob("*.jsonl"))))
    assert digest.hexdigest()[:16] == DATA
