"""Run programs that a model wrote: in bubblewrap where it is installed, else in a subprocess with resource limits.

`python -m hiplora.evaluation.sandbox` prints which of the two this machine offers. See docs/howto/code-execution.md.
"""

import contextlib
import functools
import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hiplora.errors import ConfigError, HipLoraError

_NOBODY = 65534
_OUTPUT_BYTES = 4096  # kept, the last of them

# Runs inside the sandbox. The token, printed last, shows that the program ran to its end.
_RUNNER = """
import json, os, resource, sys
job = json.loads(sys.stdin.buffer.read())
for name, value in job["limits"].items():
    resource.setrlimit(getattr(resource, name), (value, value + (name == "RLIMIT_CPU")))
exec(compile(job["source"], "<program>", "exec"), {"__name__": "__program__"})
sys.stdout.flush()
os.write(1, job["token"].encode())
"""


@dataclass(frozen=True)
class Limits:
    """What one program may use; memory is per process, file size per file (its output is one) and in all."""

    seconds: float = 30.0  # on the clock
    cpu_seconds: int = 5
    memory_bytes: int = 1 << 30
    file_bytes: int = 16 << 20
    processes: int = 16  # threads included


@dataclass(frozen=True)
class Outcome:
    """The result of a program, which passed only if it ran to its end, and the last of its output."""

    status: Literal["passed", "failed", "timed out"]
    output: str = ""

    @property
    def passed(self) -> bool:
        """Whether the program ran to its end."""
        return self.status == "passed"


@dataclass(frozen=True)
class Isolation:
    """How programs run on this machine; `user` is the account they get, None for the caller's own."""

    bubblewrap: bool
    user: int | None
    reason: str = ""  # why there is no bubblewrap

    @property
    def processes(self) -> bool:
        """Whether the number of processes is limited: not root's, and not without bubblewrap, where all would count."""
        return self.user is not None or (self.bubblewrap and os.geteuid() != 0)

    def __str__(self) -> str:
        """Describe what protects this machine, and what does not."""
        if not self.bubblewrap:
            account = "user nobody" if self.user else "you"
            return (
                f"bubblewrap is not used ({self.reason}), so programs run in a subprocess with limits on time, memory "
                f"and file sizes only: they can read and write what {account} can, use the network, and start "
                "processes that outlive them"
            )
        text = "programs run in bubblewrap: no network, no files but Python's own, no other processes"
        return text if self.processes else f"{text}; as root, the number of processes is not limited"


@functools.cache
def isolation() -> Isolation:
    """Return the strongest isolation that works here, found by running a program in each."""
    if os.name != "posix":
        raise HipLoraError("the code sandbox needs Linux or macOS; on Windows use WSL 2")
    reason = "bwrap is not on PATH: install the package bubblewrap"
    for bubblewrap in (True, False) if shutil.which("bwrap") else (False,):
        for user in (_NOBODY, None) if os.geteuid() == 0 else (None,):
            setup = Isolation(bubblewrap, user, "" if bubblewrap else reason)
            outcome = _run("", Limits(), setup)
            if outcome.passed:
                return setup
        reason = f"it does not work here: {outcome.output.strip()}"
    raise HipLoraError(f"the code sandbox cannot run Python: {outcome.output}")


def require_permission(allowed: bool) -> None:
    """Raise ConfigError unless the user `allowed` to run what a model writes; warn where bubblewrap is missing."""
    available = isolation()
    if not allowed:
        raise ConfigError(
            f"this task runs code that the model writes; pass --allow-code-execution to allow it. Here, {available}"
        )
    if not available.bubblewrap:
        logging.getLogger(__name__).warning("code sandbox: %s", available)


def run_program(source: str, limits: Limits | None = None) -> Outcome:
    """Run a Python program with the isolation this machine offers; call `require_permission` first.

    The program finds the standard library only, `__name__` is not "__main__", and standard input is empty.
    """
    return _run(source, limits or Limits(), isolation())


def _run(source: str, limits: Limits, setup: Isolation) -> Outcome:
    token, timed_out = secrets.token_hex(16), False
    job = json.dumps({"source": source, "token": token, "limits": _rlimits(limits, setup)})
    with tempfile.TemporaryDirectory(prefix="hiplora-sandbox-") as folder, tempfile.TemporaryFile() as output:
        account: dict[str, Any] = {}
        if setup.user is not None:
            account = {"user": setup.user, "group": setup.user, "extra_groups": ()}
            os.chown(folder, setup.user, setup.user)
        try:
            process = subprocess.Popen(
                [*(_bubblewrap(limits) if setup.bubblewrap else []), *_python(), "-c", _RUNNER],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/tmp"},
                start_new_session=True,
                **account,
            )
        except OSError as error:
            return Outcome("failed", str(error))
        try:
            process.communicate(job.encode(), timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(max(0, output.seek(0, os.SEEK_END) - _OUTPUT_BYTES))
        text = output.read().decode(errors="replace")
    if not timed_out and token in text:  # a program's last words, at exit, may follow it
        return Outcome("passed", text.replace(token, ""))
    cpu_time = process.returncode in (-signal.SIGXCPU, 128 + signal.SIGXCPU)  # the latter from bwrap
    return Outcome("timed out" if timed_out or cpu_time else "failed", text)


def _rlimits(limits: Limits, setup: Isolation) -> dict[str, int]:
    rlimits = {"RLIMIT_CPU": limits.cpu_seconds, "RLIMIT_FSIZE": limits.file_bytes, "RLIMIT_CORE": 0}
    if sys.platform == "linux":  # macOS does not enforce it, and refuses to set it
        rlimits["RLIMIT_AS"] = limits.memory_bytes
    if setup.processes:
        rlimits["RLIMIT_NPROC"] = limits.processes
    return rlimits


def _bubblewrap(limits: Limits) -> list[str]:
    command = ["bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--cap-drop", "ALL"]
    command += ["--uid", str(_NOBODY), "--gid", str(_NOBODY), "--die-with-parent", "--new-session"]
    for path in dict.fromkeys(("/usr", "/lib", "/lib64", "/bin", str(Path(_python()[0]).parents[1]))):
        command += ["--ro-bind-try", path, path]
    command += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev", "--size", str(limits.file_bytes)]
    return [*command, "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/"]


def _python() -> list[str]:
    """Return the command of the Python under any virtual environment, without its installed packages."""
    interpreter = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    return [interpreter, "-I", "-S", "-X", "utf8"]


if __name__ == "__main__":
    print(isolation())
