import huggingface_hub
import pytest
import torch
from peft import LoraConfig

from hiplora.adapters import AdapterUpdate, push_to_hub, server_findings
from tests.tiny import save_tiny
from tests.unit.adapters.samples import hip_config, save_tiny_gpt2, saved


def remedies(ranks, pad_rank=None, extras=(), base=""):
    factors = {name: (torch.zeros(rank, 8), torch.zeros(8, rank)) for name, rank in ranks.items()}
    update = AdapterUpdate(base, "lora", {}, factors, extras={name: torch.zeros(8) for name in extras})
    return {server: remedy for server, _, remedy in server_findings(update, pad_rank)}


@pytest.mark.parametrize(("rank", "flag"), [(16, None), (17, 32), (64, 64), (65, 128), (257, 320), (513, 0)])
def test_vllm_gets_the_smallest_rank_limit_that_it_accepts(rank, flag):
    expected = {None: {}, 0: {"vLLM": "export with --to dense"}}
    expected = expected.get(flag, {"vLLM": f"start it with --max-lora-rank {flag}"})
    assert remedies({"a.q_proj": rank}) == remedies({"a.q_proj": 8}, pad_rank=rank) == expected


def test_ranks_that_differ_trouble_both_servers_and_padding_is_the_remedy():
    uneven = {"a.q_proj": 10, "a.v_proj": 40}
    assert remedies(uneven) == {"vLLM": "export with --pad-rank 64", "llama.cpp": "export with --pad-rank 40"}
    assert remedies(uneven, pad_rank=64).keys() == {"vLLM"}
    assert remedies({"a.q_proj": 8}, extras=["lm_head.weight"]).keys() == {"vLLM", "llama.cpp"}
    assert remedies({"a.experts.down_proj.0": 8}).keys() == {"vLLM", "llama.cpp"}


def test_a_tied_output_head_and_transposed_weights_trouble_llama_cpp(tmp_path):
    for tie in (True, False):
        base = save_tiny(tmp_path / str(tie), tie=tie)
        assert set(remedies({"lm_head": 8}, base=str(base))) == ({"llama.cpp"} if tie else set())
    base = save_tiny_gpt2(tmp_path / "gpt2")
    assert set(remedies({"transformer.h.0.attn.c_attn": 8}, base=str(base))) == {"llama.cpp"}


@pytest.mark.parametrize("kind", ["hiplora", "lora"])
def test_a_failed_upload_names_the_commands_that_upload_the_same_as_privately(
    tiny_model_dir, tmp_path, kind, monkeypatch, caplog
):
    def fail(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
    config = hip_config() if kind == "hiplora" else LoraConfig(r=2, target_modules=["q_proj"])
    folder, _ = saved(tiny_model_dir, tmp_path / "a", config)
    push_to_hub(folder, "me/mine")
    upload = f"hf upload me/mine {folder} --private --exclude 'checkpoints/*'"
    if kind == "hiplora":
        upload = f"hiplora export {folder} --to lora --out {folder}-lora && hf upload me/mine {folder}-lora --private"
    assert caplog.messages == [f"me/mine: not uploaded (no network); run: {upload}"]
