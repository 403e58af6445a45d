"""HiP-LoRA as a PEFT tuner."""

import peft as _peft  # complete before any module here uses a part of it: its import registers the tuner

from hiplora.tuner.api import hip_layers, max_leak, retract_, stability_penalty, verify_base
from hiplora.tuner.calibration import (
    GRADIENT_TOKENS,
    SELF,
    TOKENS_PER_INPUT,
    Calibration,
    CalibrationText,
    calibrate,
    input_bases,
    weight_factors,
)
from hiplora.tuner.config import PEFT_TYPE, PRESETS, PROJECTIONS, HipLoraConfig
from hiplora.tuner.hooks import install
from hiplora.tuner.layer import HipLoraLinear
from hiplora.tuner.model import HipLoraModel
from hiplora.tuner.moments import base_only, restored
from hiplora.tuner.patterns import check_patterns
from hiplora.tuner.sampling import ROW_LENGTH, CalibrationStore, model_fingerprint, sampled_rows
from hiplora.tuner.state import file_names, leak_limit, other_precision_limit, plain_name
from hiplora.tuner.targets import (
    Target,
    default_targets,
    find_targets,
    for_module,
    frozen_weight,
    keep_unpacked,
    linear_target,
    matching_names,
)

# PEFT's own register function accepts only names of its enum.
_peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = HipLoraConfig  # type: ignore[index]
_peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = HipLoraModel  # type: ignore[index]
_peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = HipLoraModel.prefix  # type: ignore[index]
install()
