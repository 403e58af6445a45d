"""From the supervisor's child to the program: enter namespaces, move to a new file system, look after the program."""

import os
import signal
import sys

from hiplora.evaluation.sandbox.inside import linux, program, root

_FLAGS = {
    "user": linux.CLONE_NEWUSER,
    "mount": linux.CLONE_NEWNS,
    "pid": linux.CLONE_NEWPID,
    "network": linux.CLONE_NEWNET,
    "ipc": linux.CLONE_NEWIPC | linux.CLONE_NEWUTS,
}


class Pipes:
    """The pipes between the supervisor and the sandbox, each as (end to read, end to write).

    `output` carries what the program writes, `report` lines about the sandbox ("unshared", "started",
    "ended STATUS SECONDS",
    "refused WHY"), `go` the supervisor's leave to go on, `finished` the program's word that it came to its end.
    """

    def __init__(self) -> None:
        self.output, self.report, self.go, self.finished = (os.pipe() for _ in range(4))

    def keep(self, supervisor: bool) -> None:
        """Close the other side's ends."""
        os.close(self.go[0 if supervisor else 1])
        for pipe in (self.output, self.report, self.finished):
            os.close(pipe[1 if supervisor else 0])


def enter(job: dict, pipes: Pipes, token: bytes) -> None:
    """Build the sandbox around this process, a child of the supervisor, and run the program; never returns."""
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        pipes.keep(supervisor=False)
        nothing = os.open(os.devnull, os.O_RDWR)
        for handle in (0, 1, 2):  # whoever waits for the supervisor's answer learns at once of its death
            os.dup2(nothing, handle)
        if sys.platform == "linux":
            linux.die_with_parent()
        os.setsid()
        if unknown := set(job["layers"]) - {*_FLAGS, "account", "seccomp", "landlock"}:
            raise ValueError(f"there is no layer {min(unknown)!r}")
        _unshare(job["layers"], pipes)
        if "mount" in job["layers"]:
            root.enter(job["folder"], job["readable"], job["limits"]["file_bytes"])
        _look_after(job, pipes, token)
    except BaseException as error:
        os.write(pipes.report[1], f"refused {error}\n".encode())
    finally:
        os._exit(1)


def _unshare(layers: list[str], pipes: Pipes) -> None:
    """Leave the namespaces that the layers name; the process that returns is in all of the new ones."""
    flags = sum(flag for layer, flag in _FLAGS.items() if layer in layers)
    if flags:
        linux.call("unshare", flags)
    if "user" in layers:
        os.write(pipes.report[1], b"unshared\n")
        if not os.read(pipes.go[0], 1):
            raise OSError("the supervisor gave no leave to go on")
    if "pid" in layers and (first := os.fork()):
        os.waitpid(first, 0)
        os._exit(0)
    if sys.platform == "linux":
        linux.die_with_parent()


def _look_after(job: dict, pipes: Pipes, token: bytes) -> None:
    """Start the program, bury its orphans and report its end. In a pid namespace this is the first process:
    the program cannot harm it, and the kernel ends all others with it."""
    child = os.fork()
    if child == 0:
        program.run(job, pipes.output[1], pipes.report[1], pipes.finished[1], token)
    os.close(pipes.output[1])
    os.close(pipes.finished[1])
    ended, status, used = os.wait3(0)
    while ended != child:
        ended, status, used = os.wait3(0)
    os.write(pipes.report[1], f"ended {status} {used.ru_utime + used.ru_stime}".encode())
    os._exit(0)
