"""What a server would reject or misread in an exported adapter, said before it is exported.

Facts, checked against vLLM 0.26 (vllm/config/lora.py, vllm/lora/peft_helper.py, vllm/lora/lora_model.py) and
llama.cpp b9496 (convert_lora_to_gguf.py, src/llama-adapter.h): see docs/export.md.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from hiplora.adapters.adapter import AdapterUpdate
from hiplora.errors import AdapterError

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT_RANK = 16
# Linear layers that vLLM's models name so, packed or not; embeddings, output heads, experts and routers depend on
# the model and version.
_VLLM_NAMES = {
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "out_proj", "query_key_value", "dense"),
    *("gate_proj", "up_proj", "gate_up_proj", "down_proj", "fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h"),
}
_SERVE_DENSE = "export with --to dense and serve that"
_CONVERT_DENSE = "export with --to dense and convert that"


@dataclass(frozen=True)
class Finding:
    """One thing that a server does not take.

    `blocks` says that it refuses the adapter or reads it wrongly whatever its options; otherwise it works once
    `remedy` is followed.
    """

    server: str
    blocks: bool
    problem: str
    remedy: str

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready record."""
        return asdict(self)


@dataclass(frozen=True)
class BaseFacts:
    """What a preflight needs to know of the base model."""

    transposed: bool
    tied: bool


def base_facts(update: AdapterUpdate, model: nn.Module | None = None) -> BaseFacts | None:
    """Return the facts of the base model from a live model or its configuration; None if there is neither."""
    if model is not None:
        layers = [getattr(module, "base_layer", module) for module in model.modules()]
        config: Any = getattr(model, "config", None)
        return BaseFacts(any(isinstance(layer, Conv1D) for layer in layers), _tied(config))
    if not update.base:
        return None
    from hiplora.adapters.base_weights import BaseWeights

    try:
        weights = BaseWeights(update.base)
        layers = [weights.module(name) for name in update.factors]
    except AdapterError:  # the base model is not at hand; the preflight then says less
        return None
    return BaseFacts(any(isinstance(layer, Conv1D) for layer in layers), _tied(weights.config))


def server_findings(
    update: AdapterUpdate, pad_rank: int | None = None, base: BaseFacts | None = None
) -> list[Finding]:
    """Return what vLLM and llama.cpp's converter would reject or misread, before anything is written.

    Args:
        update: the adapter to be exported.
        pad_rank: the rank that it is going to be padded to.
        base: facts of its base model, where known.
    """
    ranks = [pad_rank or rank for rank in update.ranks.values()]
    return [*_vllm(update, ranks, base), *_llama_cpp(update, ranks, base)]


def _vllm(update: AdapterUpdate, ranks: list[int], base: BaseFacts | None) -> Iterator[Finding]:
    rank = max(ranks)
    allowed = next((value for value in VLLM_RANKS if value >= rank), None)
    if allowed is None:
        yield Finding("vLLM", True, f"rank {rank} is above its largest, {VLLM_RANKS[-1]}", _SERVE_DENSE)
    elif rank > VLLM_DEFAULT_RANK:
        problem = f"rank {rank} is above its default max_lora_rank of {VLLM_DEFAULT_RANK}"
        yield Finding("vLLM", False, problem, f"start it with --max-lora-rank {allowed}")
    if len(set(ranks)) > 1 and allowed is not None:
        problem = f"{_uneven(ranks)} and it ignores rank_pattern and alpha_pattern"
        yield Finding("vLLM", True, problem, f"export with --pad-rank {allowed}")
    if update.extras:
        yield Finding("vLLM", True, _whole_modules(update), _SERVE_DENSE)
    unusual = sorted({name.rpartition(".")[2] for name in update.factors} - _VLLM_NAMES)
    if unusual:
        problem = f"{', '.join(unusual)}: not among the layers that all its models take LoRA on"
        yield Finding("vLLM", False, problem, f"try it with your model and version, or {_SERVE_DENSE}")
    if base is not None and base.transposed:
        problem = (
            "models with transposed weights (Conv1D, as in GPT-2) are not on its list of models with LoRA"
        )
        yield Finding("vLLM", False, problem, f"try it with your version, or {_SERVE_DENSE}")


def _llama_cpp(update: AdapterUpdate, ranks: list[int], base: BaseFacts | None) -> Iterator[Finding]:
    if len(set(ranks)) > 1:
        problem = f"{_uneven(ranks)} and it keeps one alpha: all but the most usual rank are scaled wrongly, silently"
        yield Finding("llama.cpp", True, problem, f"export with --pad-rank {max(ranks)}")
    if update.extras:
        yield Finding("llama.cpp", True, _whole_modules(update), _CONVERT_DENSE)
    if not update.base:
        problem = "the adapter names no base model"
        yield Finding("llama.cpp", False, problem, "pass --base to convert_lora_to_gguf.py")
    if (
        base is not None
        and base.tied
        and any(name.rpartition(".")[2] == "lm_head" for name in update.factors)
    ):
        problem = "lm_head is adapted, but tied to the embeddings in the base model; the converter refuses it"
        yield Finding("llama.cpp", True, problem, f"{_CONVERT_DENSE} (it unties them)")
    if base is not None and base.transposed:
        problem = (
            "the base model stores transposed weights (Conv1D, as in GPT-2), and the converter would transpose the "
            "factors, which are not"
        )
        yield Finding("llama.cpp", True, problem, _CONVERT_DENSE)


def _uneven(ranks: list[int]) -> str:
    return f"ranks differ between modules ({min(ranks)} to {max(ranks)})"


def _whole_modules(update: AdapterUpdate) -> str:
    names = ", ".join(sorted({name.rpartition(".")[0] for name in update.extras}))
    return f"it replaces whole modules (modules_to_save: {names}), which is not supported"


def _tied(config: Any) -> bool:
    return bool(getattr(config, "tie_word_embeddings", False)) if config is not None else False
