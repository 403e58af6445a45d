"""Outside of the walls: start one program, watch its time, memory and output, and leave nothing of it behind.

Reads a job as JSON from standard input and answers with JSON on standard output: `status`, `seconds`, `output` and
`detail`, or `error` where the sandbox could not be made as the job wants it.
"""

import json
import os
import signal
import sys

from hiplora.evaluation.sandbox.inside import linux, root, stage, tree
from hiplora.evaluation.sandbox.inside.watch import Watch

# Users that no account has: systemd lends them to services. One for each program, so that the kernel, which
# counts processes by user, counts those of one program.
_FIRST_ACCOUNT, _ACCOUNTS = 61184, 4336


def main() -> None:
    """Do the one job that standard input describes."""
    with open(0, "rb", closefd=False) as file:
        job = json.load(file)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    try:
        answer = supervise(job)
    except (OSError, ValueError) as error:
        answer = {"error": str(error)}
    finally:
        if os.getppid() != job["parent"]:  # nobody else is left to do it
            _remove(job["folder"])
    os.write(1, json.dumps(answer).encode())


def _leave(number: int, _frame: object) -> None:
    sys.exit(128 + number)


def _remove(folder: str) -> None:
    import shutil  # slow to import and hardly ever needed

    shutil.rmtree(folder, ignore_errors=True)


def supervise(job: dict) -> dict:
    """Run one program and return what became of it, once its last process is gone.

    Raises:
        OSError: a layer of the sandbox could not be made, or a process survived its kill.
    """
    _prepare(job)
    pipes, token = stage.Pipes(), os.urandom(16).hex().encode()
    leader = os.fork()
    if leader == 0:
        stage.enter(job, pipes, token)
    try:
        pipes.keep(supervisor=True)
        _await_start(job, pipes, leader)
        watch = Watch(job, pipes, leader)
        watch.until_end()
    finally:
        tree.kill_all(leader)
    return watch.outcome(token)


def _prepare(job: dict) -> None:
    """Add to the job what only this process can find out."""
    job["readable"], job["tasks"] = [], 0
    if sys.platform != "linux":
        return
    layers = job["layers"]
    job["user"] = _FIRST_ACCOUNT + os.getpid() % _ACCOUNTS
    linux.adopt_orphans()
    if "mount" in layers or "landlock" in layers:
        job["readable"] = root.readable_paths()
    if "account" in layers:
        os.chown(job["folder"], job["user"], job["user"])
    else:  # the limit on processes counts all of this user's: those that look after the program, maybe others
        apart = "user" in layers and linux.counts_processes_by_namespace()
        job["tasks"] = (2 if "pid" in layers else 1) + (0 if apart else tree.tasks_of(os.getuid()))


def _await_start(job: dict, pipes: stage.Pipes, leader: int) -> None:
    line = _line(pipes.report[0])
    if line == "unshared":
        _map_users(leader, job["user"] if "account" in job["layers"] else None)
        os.write(pipes.go[1], b".")
        line = _line(pipes.report[0])
    if line != "started":
        raise OSError(
            line.removeprefix("refused ") or "a process of the sandbox ended before the program began"
        )


def _line(pipe: int) -> str:
    line = b""
    while (byte := os.read(pipe, 1)) not in (b"", b"\n"):
        line += byte
    return line.decode(errors="replace")


def _map_users(pid: int, account: int | None) -> None:
    """Say which users exist in the new user namespace of a process: this one and, if given, the account."""
    if os.getuid() != 0:
        _write(f"/proc/{pid}/setgroups", "deny")
    for kind, own in (("uid", os.getuid()), ("gid", os.getgid())):
        known = [own] if account is None else [own, account]
        _write(f"/proc/{pid}/{kind}_map", "".join(f"{number} {number} 1\n" for number in known))


def _write(path: str, text: str) -> None:
    with open(path, "wb", buffering=0) as file:
        file.write(text.encode())
