"""The former name of `hiplora.adapters`: `hiplora.export.save_as_lora` stays importable."""

from hiplora.adapters import *  # noqa: F403
