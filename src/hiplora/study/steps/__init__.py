"""The kinds of work that a study's jobs do, one a file, each with the version of what it computes."""

from hiplora.study.steps.registry import STEPS, Step, step

__all__ = ["STEPS", "Step", "step"]
