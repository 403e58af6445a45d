"""What a program may use, and what became of it."""

from dataclasses import dataclass, fields
from typing import Literal

from hiplora.errors import ConfigError

Status = Literal["passed", "failed", "timed out", "out of memory", "too much output", "killed"]

_MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """What one program may use, its child processes included where nothing else is said.

    `cpu_seconds` is processor time of one process, `seconds` time on the clock: the second is long, so that what
    else the machine does decides about no program. `memory_bytes` bounds the address space of each process and the
    memory of all together. `processes` counts threads too. `file_bytes` bounds one file and, where the program has
    a file system of its own, all that it writes. `output_bytes` bounds standard output and error together.

    Raises:
        ConfigError: a limit is not positive, or too small for Python to start.
    """

    seconds: float = 30.0
    cpu_seconds: int = 5
    memory_bytes: int = 1024 * _MIB
    processes: int = 16
    file_bytes: int = 16 * _MIB
    output_bytes: int = _MIB

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ConfigError(f"sandbox limit {field.name} is {value}; it must be positive")
            if field.name != "seconds" and not isinstance(value, int):
                raise ConfigError(f"sandbox limit {field.name} is {value!r}; it must be a whole number")
        if self.memory_bytes < 64 * _MIB:
            raise ConfigError(
                f"sandbox limit memory_bytes is {self.memory_bytes}; Python itself needs {64 * _MIB} (64 MiB)"
            )


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    `status` is "passed" only if the program ran to its end. `seconds` is its time on the clock, without the making
    of the sandbox. `output` is the end of what it wrote, as it wrote it, `detail` says why it did not pass.
    """

    status: Status
    seconds: float
    output: str
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the program ran to its end."""
        return self.status == "passed"
