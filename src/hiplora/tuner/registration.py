"""Make PEFT know HiP-LoRA, under a plain string: PEFT's own register function accepts only its enum's names."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from hiplora.tuner.config import PEFT_TYPE, HipLoraConfig
from hiplora.tuner.model import HipLoraModel


def register() -> None:
    """Enter the config, the tuner and the prefix into PEFT's mappings; calling it again changes nothing."""
    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = HipLoraConfig  # type: ignore[index]
    PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = HipLoraModel  # type: ignore[index]
    PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = HipLoraModel.prefix  # type: ignore[index]
