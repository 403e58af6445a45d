"""Rank-1 interventions: how much a model loses by a change of one direction of one weight."""

from hiplora.probing.correlation import (
    Association,
    Contrast,
    Correlation,
    Finding,
    contrasts,
    correlate,
    findings,
)
from hiplora.probing.directions import CHOICES, Direction, choose_directions, directions_of
from hiplora.probing.interventions import KINDS, Intervention, intervened
from hiplora.probing.modules import find_modules
from hiplora.probing.run import ProbeRecord, probe

__all__ = [
    "CHOICES",
    "KINDS",
    "Association",
    "Contrast",
    "Correlation",
    "Direction",
    "Finding",
    "Intervention",
    "ProbeRecord",
    "choose_directions",
    "contrasts",
    "correlate",
    "directions_of",
    "find_modules",
    "findings",
    "intervened",
    "probe",
]
