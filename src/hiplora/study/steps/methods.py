"""A method as a job's settings have it, with the study's file names turned into this machine's paths."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hiplora.study.engine.bench import Bench

FILES = ("calibration_text",)  # settings of methods that name files


def method_at(bench: "Bench", method: Mapping[str, Any]) -> dict[str, Any]:
    """Return a method's settings with the study's file names turned into this machine's paths."""
    placed = dict(method)
    for name in FILES:
        if placed.get(name) is not None:
            placed[name] = bench.path(placed[name])
    return placed
