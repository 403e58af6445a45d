"""The tokenizer of a model, without its weights."""

from typing import Any

from hiplora.errors import ConfigError, first_line
from hiplora.models import resolve


def load_tokenizer(model: str) -> Any:
    """Load a model's tokenizer alone.

    Raises:
        ConfigError: it has none that can be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolve(model))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model {model}: has no tokenizer that can be loaded ({first_line(error)})"
        ) from error
