"""Load a causal language model with its tokenizer."""

from typing import TYPE_CHECKING, Any

from hiplora.errors import ConfigError, first_line
from hiplora.models.known import KNOWN
from hiplora.models.quiet import quiet_transformers
from hiplora.models.resolving import resolve

if TYPE_CHECKING:
    import torch


def load(model: str, dtype: "torch.dtype | str | None" = None) -> tuple[Any, Any]:
    """Load `(model, tokenizer)` by name, folder or hub name, in evaluation mode.

    Args:
        model: as for `resolve`.
        dtype: of the weights; None is float32, `"auto"` is what the checkpoint says.

    A tokenizer without a padding token gets its end token for that, as every batch needs one.

    Raises:
        ConfigError: there is no such folder or hub model, or it is not a causal language model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = resolve(model)
    try:
        with quiet_transformers(always=False):
            tokenizer = AutoTokenizer.from_pretrained(path)
            network = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or torch.float32)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model {model}: cannot be loaded ({first_line(error)}); expected a folder with config.json, weights "
            f"and tokenizer, a hub name that this machine can reach, or one of {', '.join(sorted(KNOWN))}"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return network.eval(), tokenizer
