"""What vLLM (0.26) and llama.cpp's converter (b9496) reject or misread in an exported adapter, found before writing."""

from collections.abc import Iterator
from dataclasses import dataclass

from hiplora.adapters.base import BaseWeights, is_tied, is_transposed
from hiplora.adapters.update import AdapterUpdate
from hiplora.errors import AdapterError

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT_RANK = 16
_DENSE = "export with --to dense"


@dataclass(frozen=True)
class Finding:
    """One thing that a server does not take; `blocks` says that no option of the server helps."""

    server: str
    blocks: bool
    problem: str
    remedy: str


def server_findings(update: AdapterUpdate, pad_rank: int | None = None) -> list[Finding]:
    """Return what vLLM and llama.cpp's converter would reject or misread of an adapter padded to `pad_rank`."""
    ranks = [pad_rank or rank for rank in update.ranks.values()]
    return [*_both(update), *_vllm(ranks), *_llama_cpp(update, ranks)]


def _both(update: AdapterUpdate) -> Iterator[Finding]:
    for server in ("vLLM", "llama.cpp"):
        if update.extras:
            yield Finding(server, True, "it replaces whole modules (modules_to_save)", _DENSE)
        if is_transposed(update):
            problem = "the base model stores transposed weights (Conv1D, as in GPT-2)"
            yield Finding(server, server == "llama.cpp", problem, _DENSE)


def _vllm(ranks: list[int]) -> Iterator[Finding]:
    rank = max(ranks)
    allowed = next((value for value in VLLM_RANKS if value >= rank), None)
    if allowed is None:
        yield Finding("vLLM", True, f"rank {rank} is above its largest, {VLLM_RANKS[-1]}", _DENSE)
        return
    if rank > VLLM_DEFAULT_RANK:
        problem = f"rank {rank} is above its default max_lora_rank of {VLLM_DEFAULT_RANK}"
        yield Finding("vLLM", False, problem, f"start it with --max-lora-rank {allowed}")
    if len(set(ranks)) > 1:
        problem = "ranks differ between modules and it ignores rank_pattern and alpha_pattern"
        yield Finding("vLLM", True, problem, f"export with --pad-rank {allowed}")


def _llama_cpp(update: AdapterUpdate, ranks: list[int]) -> Iterator[Finding]:
    if len(set(ranks)) > 1:
        problem = (
            "ranks differ between modules and it keeps one alpha: other ranks are scaled wrongly, silently"
        )
        yield Finding("llama.cpp", True, problem, f"export with --pad-rank {max(ranks)}")
    if any(name.rpartition(".")[2] == "lm_head" for name in update.factors) and _tied(update.base):
        problem = "lm_head is adapted, but tied to the embeddings in the base model"
        yield Finding("llama.cpp", True, problem, f"{_DENSE}, which unties them")


def _tied(base: str) -> bool:
    try:
        return is_tied(BaseWeights(base).skeleton)
    except AdapterError:  # the base model is not at hand; this says less then
        return False
