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
    ranks = {pad_rank or rank for rank in update.ranks.values()}
    return [*_vllm(update, ranks), *_llama_cpp(update, ranks)]


def _vllm(update: AdapterUpdate, ranks: set[int]) -> Iterator[Finding]:
    rank = max(ranks)
    allowed = next((value for value in VLLM_RANKS if value >= rank), None)
    if update.extras or allowed is None:
        problem = f"rank above {VLLM_RANKS[-1]}" if allowed is None else "it replaces whole modules"
        yield Finding("vLLM", True, problem, _DENSE)
    elif len(ranks) > 1:
        problem = "ranks differ between modules and it ignores rank_pattern and alpha_pattern"
        yield Finding("vLLM", True, problem, f"export with --pad-rank {allowed}")
    elif rank > VLLM_DEFAULT_RANK:
        problem = f"rank {rank} is above its default max_lora_rank of {VLLM_DEFAULT_RANK}"
        yield Finding("vLLM", False, problem, f"start it with --max-lora-rank {allowed}")


def _llama_cpp(update: AdapterUpdate, ranks: set[int]) -> Iterator[Finding]:
    if len(ranks) > 1:
        problem = (
            "ranks differ between modules and it keeps one alpha: other ranks are scaled wrongly, silently"
        )
        yield Finding("llama.cpp", True, problem, f"export with --pad-rank {max(ranks)}")
    head = any(name.rpartition(".")[2] == "lm_head" for name in update.factors)
    for problem, found in (
        ("it replaces whole modules", bool(update.extras)),
        ("the base model stores transposed weights (Conv1D, as in GPT-2)", is_transposed(update)),
        ("lm_head is adapted, but tied to the embeddings in the base model", head and _tied(update.base)),
    ):
        if found:
            yield Finding("llama.cpp", True, problem, _DENSE)


def _tied(base: str) -> bool:
    try:
        return is_tied(BaseWeights(base).skeleton)
    except AdapterError:  # the base model is not at hand; this says less then
        return False
