"""Watch one program's time, memory, processes and output, and judge how it ended."""

import os
import select
import signal
import sys
import time

from hiplora.evaluation.sandbox.inside import stage, tree
from hiplora.evaluation.sandbox.inside.program import OUT_OF_MEMORY

_TAIL = 4096  # bytes of output that are kept
_LOOK = 0.05  # seconds between looks at memory and processes
_CHUNK = 2**12


class Watch:
    """One program from its start to its end; `verdict` is what ended it from outside, as (status, detail)."""

    def __init__(self, job: dict, pipes: stage.Pipes, leader: int) -> None:
        self.limits, self.parent, self.pipes = job["limits"], job["parent"], pipes
        self.keepers = {leader, *(tree.descendants(leader)[:1] if "pid" in job["layers"] else ())}
        self.began = time.monotonic()
        self.seconds = 0.0
        self.report: bytes | None = None
        self.verdict: tuple[str, str] | None = None
        self.tail, self.written = b"", 0
        os.set_blocking(pipes.output[0], False)

    def until_end(self) -> None:
        """Return when the program has ended or must not go on; the caller then kills what is left.

        Raises:
            SystemExit: the process that asked for the program is gone.
        """
        next_look = 0.0
        watched = [self.pipes.output[0], self.pipes.report[0]]
        while self.report is None and self.verdict is None:
            ready, _, _ = select.select(watched, [], [], _LOOK)
            if self.pipes.output[0] in ready and not self._read_output():
                watched.remove(self.pipes.output[0])
            if self.pipes.report[0] in ready:
                self.report = os.read(self.pipes.report[0], 64)
            now = time.monotonic()
            self.seconds = now - self.began
            if now >= next_look:
                next_look = now + _LOOK
                self._look()

    def _read_output(self) -> bool:
        """Take what was written, in part; False at its end."""
        try:
            chunk = os.read(self.pipes.output[0], _CHUNK)
        except BlockingIOError:
            return False
        self.written += len(chunk)
        self.tail = (self.tail + chunk)[-_TAIL:]
        if self.written > self.limits["output_bytes"]:
            self.verdict = ("too much output", f"more than {self.limits['output_bytes']} bytes")
        return bool(chunk)

    def _look(self) -> None:
        """Find what the kernel's limits do not: the sum over processes, the clock, a caller that is gone."""
        if os.getppid() != self.parent:
            sys.exit(1)
        pids = [pid for pid in tree.descendants(os.getpid()) if pid not in self.keepers]
        if self.seconds > self.limits["seconds"]:
            self.verdict = ("timed out", f"after {self.limits['seconds']:g} s on the clock")
        elif len(pids) > self.limits["processes"]:
            self.verdict = ("killed", f"more than {self.limits['processes']} processes")
        elif tree.memory(pids) > self.limits["memory_bytes"]:
            self.verdict = (
                "out of memory",
                f"more than {self.limits['memory_bytes']} bytes in all processes",
            )

    def outcome(self, token: bytes) -> dict:
        """Return what became of the program, whose processes are all gone by now."""
        while self.verdict is None and self._read_output():
            pass
        os.set_blocking(self.pipes.finished[0], False)
        try:
            told = os.read(self.pipes.finished[0], 64)
        except BlockingIOError:
            told = b""
        status, detail = self.verdict or self._judge(told, token)
        text = self.tail.decode(errors="replace")
        return {"status": status, "seconds": self.seconds, "output": text, "detail": detail}

    def _judge(self, told: bytes, token: bytes) -> tuple[str, str]:
        if not self.report:
            return "killed", "with the process that looks after it"
        status, cpu = int(self.report.split()[1]), float(self.report.split()[2])
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            if number == signal.SIGXCPU or cpu >= self.limits["cpu_seconds"]:
                return "timed out", f"after {self.limits['cpu_seconds']} s of processor time"
            return "killed", f"signal {signal.Signals(number).name}"
        if told == OUT_OF_MEMORY:
            return "out of memory", "MemoryError"
        if status == 0 and told.startswith(token):
            return "passed", ""
        if told == b"" or told.startswith(token):
            return "failed", f"left with exit status {os.WEXITSTATUS(status)} before its end"
        return "failed", f"{told.decode(errors='replace')} before its end"
