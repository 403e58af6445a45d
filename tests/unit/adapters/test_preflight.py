import pytest
import torch

from hiplora.adapters.adapter import AdapterUpdate
from hiplora.adapters.preflight import BaseFacts, base_facts, server_findings
from tests.unit.adapters.samples import save_tiny_gpt2

PLAIN = BaseFacts(transposed=False, tied=False)


def update(ranks, extras=(), base="some/model"):
    factors = {name: (torch.zeros(rank, 8), torch.zeros(8, rank)) for name, rank in ranks.items()}
    return AdapterUpdate(base, "lora", {}, factors, extras={name: torch.zeros(8) for name in extras})


def uniform(rank, *names):
    return update(dict.fromkeys(names or ("model.layers.0.self_attn.q_proj",), rank))


def blocking(found, server):
    return [finding for finding in found if finding.blocks and finding.server == server]


@pytest.mark.parametrize("rank", [1, 8, 16])
def test_a_usual_adapter_gives_no_findings(rank):
    assert server_findings(uniform(rank), base=PLAIN) == []


@pytest.mark.parametrize(("rank", "flag"), [(17, 32), (48, 64), (64, 64), (65, 128), (257, 320), (321, 512)])
def test_vllm_is_told_the_smallest_rank_limit_that_it_accepts(rank, flag):
    (finding,) = server_findings(uniform(rank), base=PLAIN)
    assert finding.server == "vLLM"
    assert not finding.blocks
    assert finding.remedy == f"start it with --max-lora-rank {flag}"


def test_a_rank_above_all_of_vllms_blocks():
    (finding,) = blocking(server_findings(uniform(513), base=PLAIN), "vLLM")
    assert "512" in finding.problem
    assert "--to dense" in finding.remedy


def test_the_rank_that_counts_is_the_padded_one():
    (finding,) = server_findings(uniform(8), pad_rank=64, base=PLAIN)
    assert "rank 64" in finding.problem


def test_ranks_that_differ_block_both_servers_and_padding_is_the_remedy():
    uneven = update({"a.q_proj": 10, "a.v_proj": 40})
    found = server_findings(uneven, base=PLAIN)
    assert [finding.remedy for finding in blocking(found, "vLLM")] == ["export with --pad-rank 64"]
    assert [finding.remedy for finding in blocking(found, "llama.cpp")] == ["export with --pad-rank 40"]
    assert not [finding for finding in server_findings(uneven, pad_rank=64, base=PLAIN) if finding.blocks]


def test_modules_saved_whole_block_both_servers():
    found = server_findings(update({"a.q_proj": 8}, extras=["lm_head.weight"]), base=PLAIN)
    assert {finding.server for finding in found if finding.blocks} == {"vLLM", "llama.cpp"}
    assert all("lm_head" in finding.problem for finding in found)


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens", "model.layers.0.block_sparse_moe.router"])
def test_unusual_layers_are_named_for_vllm(name):
    (finding,) = server_findings(uniform(8, name), base=PLAIN)
    assert finding.server == "vLLM"
    assert name.rpartition(".")[2] in finding.problem


def test_a_tied_output_head_blocks_llama_cpp_and_an_untied_one_does_not():
    assert blocking(server_findings(uniform(8, "lm_head"), base=BaseFacts(False, tied=True)), "llama.cpp")
    assert not blocking(server_findings(uniform(8, "lm_head"), base=PLAIN), "llama.cpp")


def test_transposed_weights_block_llama_cpp():
    (finding,) = blocking(
        server_findings(uniform(8, "h.0.attn.c_attn"), base=BaseFacts(True, False)), "llama.cpp"
    )
    assert "Conv1D" in finding.problem


def test_llama_cpp_needs_to_be_told_the_base_model():
    (finding,) = server_findings(update({"a.q_proj": 8}, base=""))
    assert finding.remedy == "pass --base to convert_lora_to_gguf.py"


def test_facts_come_from_the_base_models_configuration(tmp_path):
    base = save_tiny_gpt2(tmp_path / "gpt2")
    adapter = update({"transformer.h.0.attn.c_attn": 8}, base=str(base))
    assert base_facts(adapter) == BaseFacts(transposed=True, tied=True)
    assert base_facts(update({"a.q_proj": 8}, base=str(tmp_path / "nowhere"))) is None


def test_facts_come_from_a_live_model(hip):
    from hiplora.adapters import update_from_model

    assert base_facts(update_from_model(hip[1]), hip[1]) == BaseFacts(transposed=False, tied=False)
