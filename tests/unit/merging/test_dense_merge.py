import json
import subprocess
import sys

import pytest
import torch
from peft.utils import merge_utils

from hiplora.adapters import read_update
from hiplora.errors import AdapterError
from hiplora.merging import RULES, DenseMerge, merge, save_merged
from hiplora.training.memory import CLEAR
from tests import reference
from tests.unit.adapters.samples import hip_config, product, saved
from tests.unit.merging.terms import lora_term

Q0, UP0 = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"

MEMORY = """
import json, os
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the peak is that of resident memory
import torch
torch.set_num_threads(1)
from hiplora.merging import RULES, DenseMerge
from hiplora.merging.term import Term
from hiplora.training.memory import peak_bytes, reset_peak
size = 4096

def peak_of(work):
    reset_peak()
    before = peak_bytes()
    work()
    return (peak_bytes() - before) / (4 * size * size)

def merge(rule, count, size):
    terms = [Term((torch.randn(16, size), torch.randn(size, 16))) for _ in range(count)]
    return DenseMerge("", {}, {"a": terms}, rule, rule.make_options())

found = []
for rule in RULES.values():
    if rule.kind == "dense":
        merge(rule, 2, 64).delta("a")  # what is loaded and allocated once
        for count in (1, 3):
            whole = merge(rule, count, size)
            found.append((rule.name, count, peak_of(lambda: whole.delta("a"))))
print(json.dumps(found))
"""


@pytest.fixture(scope="session")
def three(adapters):
    return [adapters[name] for name in ("one", "lora", "mlp")]


def dense(folders, module):
    parts = [read_update(folder) for folder in folders]
    return [product(part, module) for part in parts if module in part.factors]


def test_a_module_is_merged_when_it_is_asked_for(three):
    update = merge(three, "ties", weights=(1, 0.5, -1))
    assert isinstance(update, DenseMerge)
    assert update.modules == tuple(sorted(set(update.modules)))
    assert {Q0, UP0} < set(update.modules)
    assert update.shape(Q0) == (64, 64)
    assert update.shape(UP0) == (96, 64)
    expected = merge_utils.ties(dense(three, Q0), torch.tensor([1.0, 0.5]), 0.2)
    torch.testing.assert_close(update.delta(Q0), expected, rtol=1e-4, atol=1e-7)
    expected = merge_utils.ties(dense(three, UP0), torch.tensor([-1.0]), 0.2)
    torch.testing.assert_close(update.delta(UP0), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("method", [name for name, rule in RULES.items() if rule.kind == "dense"])
def test_asking_again_gives_the_same(three, method):
    update = merge(three, method)
    first = update.delta(Q0)
    assert first.dtype == torch.float32
    assert torch.equal(update.delta(Q0), first)
    assert torch.equal(merge(three, method).delta(Q0), first)


def test_each_module_draws_by_itself():
    """Two modules of the same update: what is drawn for one is not drawn for the other."""
    rule, term = RULES["dare"], lora_term(1)
    update = DenseMerge("", {}, {"a": [term], "b": [term]}, rule, rule.make_options())
    assert not torch.equal(update.delta("a"), update.delta("b"))


def test_it_says_what_an_update_says(three, tiny_model_dir):
    update = merge(three, "ties", weights=(1, 0.5, 2))
    assert update.base == str(tiny_model_dir)
    assert update.source == f"ties of 1 × {three[0]}, 0.5 × {three[1]}, 2 × {three[2]}"
    assert update.fingerprints == read_update(three[0]).fingerprints
    assert update.config["peft_type"] == "LORA"
    assert update.kind == "merged"


def test_options_reach_the_rule(three):
    kept = (merge(three[:1], "ties", options={"density": 0.5}).delta(Q0) != 0).float().mean().item()
    assert kept == pytest.approx(0.5)


def test_factors_of_a_module_are_the_best_of_their_rank(three):
    update = merge(three, "ties")
    (A, B), error = update.factors(Q0, 6)
    near, expected = reference.best_of_rank(update.delta(Q0), 6)
    assert error == pytest.approx(expected, abs=1e-5)
    assert (B @ A - near).norm() / near.norm() < 1e-3
    assert update.factors(Q0, 1000)[1] < 1e-4


def test_a_module_that_is_trimmed_away_has_factors_too(three):
    update = merge(three, "ties", options={"density": 1e-9})
    (A, B), error = update.factors(Q0, 6)
    assert (A.shape, B.shape, error) == ((1, 64), (64, 1), 0.0)


def test_modules_saved_whole_stay_with_a_merge_of_one(tiny_model_dir, tmp_path):
    whole, _ = saved(tiny_model_dir, tmp_path / "a", hip_config(modules_to_save=["lm_head"]))
    assert set(merge([whole], "ties").extras) == {"lm_head.weight"}
    assert set(merge([whole], "ties", rank=3).extras) == {"lm_head.weight"}


def test_it_is_no_lora_adapter_and_says_what_to_do(three, tmp_path):
    with pytest.raises(AdapterError, match=r"full rank.*rank=.*save_dense"):
        save_merged(merge(three, "ties"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not CLEAR.exists(), reason="peak memory is read from Linux's /proc")
def test_a_module_takes_less_than_twice_its_size_per_adapter():
    """Measured on a module of 64 MiB in a fresh process: the peak of resident memory over what was there before."""
    command = [sys.executable, "-c", MEMORY]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=300).stdout)
    assert {name for name, _, _ in found} == {"ties", "dare", "magnitude"}
    for name, count, peak in found:
        assert 0.9 < peak < 2 * count, (name, count, peak)
