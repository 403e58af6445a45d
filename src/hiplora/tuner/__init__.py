"""HiP-LoRA as a PEFT tuner."""

import peft as _peft  # noqa: F401 - whole before any module here uses a part of it: its import registers the tuner

from hiplora.tuner.api import check_leak, hip_layers, max_leak, retract_, stability_penalty
from hiplora.tuner.calibration import Calibration, calibrate
from hiplora.tuner.config import HipLoraConfig
from hiplora.tuner.layer import HipLoraLinear
from hiplora.tuner.model import HipLoraModel
from hiplora.tuner.registration import register

register()

__all__ = [
    "Calibration",
    "HipLoraConfig",
    "HipLoraLinear",
    "HipLoraModel",
    "calibrate",
    "check_leak",
    "hip_layers",
    "max_leak",
    "retract_",
    "stability_penalty",
]
