"""What vLLM (0.26) and llama.cpp's converter (b9496) reject or misread in an exported adapter, found before writing."""

from hiplora.adapters.base import BaseWeights, is_tied, is_transposed
from hiplora.adapters.update import AdapterUpdate
from hiplora.errors import AdapterError

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT_RANK = 16
_DENSE = "export with --to dense"


def server_findings(update: AdapterUpdate, pad_rank: int | None = None) -> list[tuple[str, str, str]]:
    """Return what servers reject or misread of an adapter padded to `pad_rank`: (server, problem, remedy) each."""
    ranks = {pad_rank or rank for rank in update.ranks.values()}
    largest = max(ranks)
    allowed = next((rank for rank in VLLM_RANKS if rank >= largest), None)
    if update.extras:
        found = [(server, "it replaces whole modules", _DENSE) for server in ("vLLM", "llama.cpp")]
    elif allowed is None:
        found = [("vLLM", f"rank above {VLLM_RANKS[-1]}", _DENSE)]
    elif len(ranks) > 1:
        vllm = "ranks differ between modules and it ignores rank_pattern and alpha_pattern"
        found = [("vLLM", vllm, f"export with --pad-rank {allowed}")]
    elif largest > VLLM_DEFAULT_RANK:
        vllm = f"rank {largest} is above its default max_lora_rank of {VLLM_DEFAULT_RANK}"
        found = [("vLLM", vllm, f"start it with --max-lora-rank {allowed}")]
    else:
        found = []
    if len(ranks) > 1:
        problem = "ranks differ between modules and it keeps one alpha: other ranks are scaled wrongly, silently"
        found.append(("llama.cpp", problem, f"export with --pad-rank {largest}"))
    if is_transposed(update):
        found.append(("llama.cpp", "the base model stores transposed weights (as GPT-2)", _DENSE))
    if any(name.rpartition(".")[2] == "lm_head" for name in update.factors) and _tied(update.base):
        found.append(("llama.cpp", "lm_head is adapted, but tied to the embeddings", _DENSE))
    return found


def _tied(base: str) -> bool:
    try:
        return is_tied(BaseWeights(base).skeleton)
    except AdapterError:  # the base model is not at hand; this says less then
        return False
