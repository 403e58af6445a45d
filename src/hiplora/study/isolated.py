"""Work in a process of its own: its peak memory is its own, and its memory is given back when it is done.

Run as `python -m hiplora.study.isolated module:function REPORT`, with the arguments as one line of JSON on
standard input, which stays open for as long as the caller lives.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from pathlib import Path
from typing import Any

from hiplora import errors
from hiplora.errors import HipLoraError


def run_isolated(target: str, arguments: dict[str, Any]) -> None:
    """Call `module:function` with JSON-able keyword arguments in a fresh Python process and wait for it.

    The function's result is dropped: it stores what it finds. Its standard output goes to standard error.

    Raises:
        HipLoraError: what the function raised, of the same class; or the process died, with the reason.
        OSError: what the function raised.
    """
    with tempfile.TemporaryDirectory(prefix="hiplora-") as temporary:
        report = Path(temporary) / "error.json"
        process = subprocess.Popen(
            [sys.executable, "-m", "hiplora.study.isolated", target, str(report)],
            stdin=subprocess.PIPE,
            stdout=2,  # this process's standard error, whatever sys.stderr is
        )
        try:
            _send(process, arguments)
            status = process.wait()
        finally:
            _end(process)
        if status:
            _raise(status, report, target)


def run_here(target: str, arguments: dict[str, Any]) -> None:
    """Do in this process what `run_isolated` does in another."""
    module, _, function = target.partition(":")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # the libraries' advice to each other
        getattr(importlib.import_module(module), function)(**arguments)


def _send(process: subprocess.Popen, arguments: dict[str, Any]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died at once: its status says why
        process.stdin.write(json.dumps(arguments).encode() + b"\n")
        process.stdin.flush()


def _end(process: subprocess.Popen) -> None:
    """Leave no process behind, whatever interrupted the wait."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def _raise(status: int, report: Path, target: str) -> None:
    if report.is_file():
        told = json.loads(report.read_text(encoding="utf-8"))
        kind = getattr(errors, told["type"], OSError)
        raise kind(told["message"])
    if status == -signal.SIGINT or status == 130:
        raise KeyboardInterrupt
    if status < 0:
        hint = ", most often for lack of memory" if status == -signal.SIGKILL else ""
        raise HipLoraError(
            f"the process of {target} was stopped by signal {-status}{hint}; run the same command again: "
            "what is finished is kept"
        )
    raise HipLoraError(f"the process of {target} failed with status {status}; its own message is above")


def _work(target: str, report: Path) -> int:
    arguments = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=leave_with_caller, daemon=True).start()
    try:
        run_here(target, arguments)
    except (HipLoraError, OSError) as error:
        if os.environ.get("HIPLORA_DEBUG"):
            traceback.print_exc()
        report.write_text(json.dumps({"type": type(error).__name__, "message": str(error)}), encoding="utf-8")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def leave_with_caller() -> None:
    """End with the process that asked, however it ended; every file is whole or absent, so nothing is lost."""
    while os.read(0, 1):  # not sys.stdin, whose lock a thread must not hold at the interpreter's end
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(_work(sys.argv[1], Path(sys.argv[2])))
