"""What a study's jobs will cost in time, memory and disk, told before anything runs.

A `Load` says what a job does, a `Machine` how fast that goes, `cost` what it comes to. Machines are measured
(`measure_machine`) or named (`gpu`), the latter by data sheet and an assumed share of it.
"""

from hiplora.study.estimate.cost import cost
from hiplora.study.estimate.factoring import calibration_load, full_settings, svd_load
from hiplora.study.estimate.load import Cost, Load
from hiplora.study.estimate.machine import GPUS, Machine, gpu
from hiplora.study.estimate.measuring import measure_machine
from hiplora.study.estimate.memory import adapter_elements, memory_bytes

__all__ = [
    "GPUS",
    "Cost",
    "Load",
    "Machine",
    "adapter_elements",
    "calibration_load",
    "cost",
    "full_settings",
    "gpu",
    "measure_machine",
    "memory_bytes",
    "svd_load",
]
