"""The processes below this one: who they are, what memory they hold, and how to be rid of them all."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable

_PAGE = os.sysconf("SC_PAGE_SIZE")
_PATIENCE = 10.0  # seconds in which killed processes must be gone


def descendants(pid: int) -> list[int]:
    """List the living descendants of a process, parents before children; without /proc there are none to see."""
    children = _children_of if os.path.exists(f"/proc/{pid}/task/{pid}/children") else _scanned()
    found, level = [], [pid]
    while level:
        level = [child for parent in level for child in children(parent)]
        found += level
    return [process for process in found if _alive(process)]


def memory(pids: list[int]) -> int:
    """Return the bytes of memory that these processes hold, what they share counted for each."""
    return _PAGE * sum(int(_read(f"/proc/{pid}/statm", b"0 0").split()[1]) for pid in pids)


def tasks_of(user: int) -> int:
    """Count the threads of all of a user's processes."""
    count = 0
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == user:
                count += len(os.listdir(f"/proc/{name}/task"))
    return count


def kill_all(leader: int) -> None:
    """Kill every descendant of this process and wait until none is left; `leader`, its child, is the first.

    Orphans must come back to this process (`linux.adopt_orphans`); where they cannot, on other systems than Linux,
    only the process group of `leader` is killed.

    Raises:
        OSError: processes are still there after ten seconds.
    """
    deadline = time.monotonic() + _PATIENCE
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(leader, signal.SIGKILL)
    while not _none_left():
        # The dead are not reaped before the living are gone: they use up the number of processes allowed, so
        # that a program which keeps forking away from the signal runs out of it.
        while living := descendants(os.getpid()):
            for pid in living:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise OSError(f"{len(living)} processes of a program outlived their kill")
        time.sleep(0.001)


def _none_left() -> bool:
    """Reap dead children; say whether this process has neither children nor, as they would come to it, others."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return True
    return False


def _children_of(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):  # it ended while it was looked at
        for thread in os.listdir(f"/proc/{pid}/task"):
            found += map(int, _read(f"/proc/{pid}/task/{thread}/children").split())
    return found


def _scanned() -> Callable[[int], list[int]]:
    """Return a function like `_children_of`, from one look at all processes; for kernels without the list."""
    children: dict[int, list[int]] = {}
    if sys.platform == "linux":
        for name in os.listdir("/proc"):
            if name.isdigit() and (stat := _stat(int(name))):
                children.setdefault(int(stat[1]), []).append(int(name))
    return lambda pid: children.get(pid, [])


def _alive(pid: int) -> bool:
    stat = _stat(pid)
    other_threads = len(stat) > 17 and int(stat[17]) > 1  # they live on when the first has ended
    return bool(stat) and (stat[0] not in (b"Z", b"X") or other_threads)


def _stat(pid: int) -> list[bytes]:
    """Return a process's state, parent and so on; the name before them may hold anything."""
    return _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()


def _read(path: str, otherwise: bytes = b"") -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read() or otherwise
    except OSError:
        return otherwise
