"""A sandbox for programs that a model wrote: time, memory, files, network and processes are bounded.

`require_permission` asks the user, `run_programs` runs, `guards` says what protects this machine and what does not;
`python -m hiplora.evaluation.sandbox` prints that. See docs/code-sandbox.md.
"""

from hiplora.evaluation.sandbox.isolation import Guard, guards, missing_guards, require_permission
from hiplora.evaluation.sandbox.limits import Limits, Outcome
from hiplora.evaluation.sandbox.run import run_program, run_programs

__all__ = [
    "Guard",
    "Limits",
    "Outcome",
    "guards",
    "missing_guards",
    "require_permission",
    "run_program",
    "run_programs",
]
