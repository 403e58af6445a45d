"""Attention over packed sequences, one document at a time, exactly.

Without a variable-length kernel, transformers keeps packed documents apart with a dense mask: for a row of 2048
tokens made of ten documents, nine tenths of the attention is computed and thrown away. Here each document gets
its own causal attention, so nothing is computed across documents and no mask is built. Same numbers, to rounding.
"""

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "hiplora_packed"


def use_packed_attention(model: PreTrainedModel, max_length: int) -> bool:
    """Switch a model to per-document attention if that is exact for it; return whether it was.

    It is for models whose layers are plain causal attention through SDPA: a sliding window shorter than
    `max_length`, chunked or linear attention, or another kernel than SDPA are left as they are. Afterwards the
    model takes flattened batches only (one row, with `cu_seq_lens_q`).
    """
    if not _is_plain(model, max_length):
        return False
    AttentionInterface.register(NAME, _packed_attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    model.set_attn_implementation(NAME)
    return True


def _is_plain(model: PreTrainedModel, max_length: int) -> bool:
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        model.config._attn_implementation == "sdpa"
        and bool(getattr(model, "_supports_attention_backend", False))
        and kinds <= {"full_attention", "sliding_attention"}
        and (window is None or window >= max_length)
        and getattr(config, "attn_logit_softcapping", None) is None
    )


def _no_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> None:
    """No mask is built: the documents are apart already. A padded batch has no place here."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError("packed attention takes flattened batches; this one is padded")


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend inside each document of a flattened row: query (1, heads, tokens, d) → (1, tokens, heads, d)."""
    edges = _edges(kwargs.pop("cu_seq_lens_q", None), kwargs.get("position_ids"))
    if edges is None or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError("packed attention needs one flattened row, with cu_seq_lens_q or position_ids")
    pieces = [
        sdpa_attention_forward(module, query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], None, **kwargs)[0]
        for a, b in itertools.pairwise(edges)
    ]
    return torch.cat(pieces, dim=1), None


def _edges(boundaries: Tensor | None, positions: Tensor | None) -> list[int] | None:
    """Where documents begin, and the end of the last; read off positions where TRL (below 1.15) says no more."""
    if boundaries is not None:
        return boundaries.tolist()
    if positions is None or positions.shape[0] != 1:
        return None
    return [*(positions[0] == 0).nonzero().flatten().tolist(), positions.shape[1]]
