import pytest
import torch

from hiplora.adapters import AdapterUpdate, server_findings
from tests.tiny import save_tiny
from tests.unit.adapters.samples import save_tiny_gpt2


def update(ranks, extras=(), base=""):
    factors = {name: (torch.zeros(rank, 8), torch.zeros(8, rank)) for name, rank in ranks.items()}
    return AdapterUpdate(base, "lora", {}, factors, extras={name: torch.zeros(8) for name in extras})


def remedies(*arguments, **options):
    return {server: remedy for server, _, remedy in server_findings(*arguments, **options)}


@pytest.mark.parametrize(("rank", "flag"), [(16, None), (17, 32), (64, 64), (65, 128), (257, 320), (513, 0)])
def test_vllm_gets_the_smallest_rank_limit_that_it_accepts(rank, flag):
    found = remedies(update({"a.q_proj": rank}))
    expected = {None: {}, 0: {"vLLM": "export with --to dense"}}
    assert found == expected.get(flag, {"vLLM": f"start it with --max-lora-rank {flag}"})
    assert remedies(update({"a.q_proj": 8}), pad_rank=rank) == found


def test_ranks_that_differ_trouble_both_servers_and_padding_is_the_remedy():
    uneven = update({"a.q_proj": 10, "a.v_proj": 40})
    expected = {"vLLM": "export with --pad-rank 64", "llama.cpp": "export with --pad-rank 40"}
    assert remedies(uneven) == expected
    assert remedies(uneven, pad_rank=64).keys() == {"vLLM"}
    whole = update({"a.q_proj": 8}, extras=["lm_head.weight"])
    assert remedies(whole).keys() == {"vLLM", "llama.cpp"}


def test_a_tied_output_head_and_transposed_weights_trouble_llama_cpp(tmp_path):
    for tie in (True, False):
        base = save_tiny(tmp_path / str(tie), tie=tie)
        assert set(remedies(update({"lm_head": 8}, base=str(base)))) == ({"llama.cpp"} if tie else set())
    base = save_tiny_gpt2(tmp_path / "gpt2")
    assert set(remedies(update({"transformer.h.0.attn.c_attn": 8}, base=str(base)))) == {"llama.cpp"}
