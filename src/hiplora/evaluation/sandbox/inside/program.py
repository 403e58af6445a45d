"""Within the walls: give up every right, then run the program."""

import contextlib
import fcntl
import os
import resource
import sys

from hiplora.evaluation.sandbox.inside import landlock, linux, root, seccomp

OUT_OF_MEMORY = b"out of memory"
_NAME = "solution"  # not __main__: blocks for the command line do not run, as in HumanEval's own harness


def run(job: dict, output: int, report: int, finished: int, token: bytes) -> None:
    """Confine this process as the job says, tell `report`, run the program, and tell `finished`; never returns.

    `finished` receives `token` only when the program's last statement is done, so leaving early does not count.
    """
    output, report, finished = _arrange(output, report, finished)
    try:
        confine(job)
    except OSError as error:
        os.write(report, f"refused {error}\n".encode())
        os._exit(1)
    os.write(report, b"started\n")
    os.close(report)
    for name in [name for name in sys.modules if name.partition(".")[0] == "hiplora"]:
        del sys.modules[name]
    problem = _execute(job["source"])
    _flush()
    os.write(finished, token if problem is None else problem)
    os._exit(0 if problem is None else 1)


def _execute(source: str) -> bytes | None:
    """Run a program as a module of its own; return what ended it before its end, or None."""
    module = type(sys)(_NAME)
    sys.modules[_NAME] = module
    sys.argv[:] = [_NAME]
    try:
        exec(compile(source, f"<{_NAME}>", "exec", dont_inherit=True), module.__dict__)
    except MemoryError:
        return OUT_OF_MEMORY
    except BaseException as error:
        _flush()
        with contextlib.suppress(BaseException):  # an exception of the program's own may do as it likes
            error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next  # without this function
            sys.__excepthook__(type(error), error, error.__traceback__)
        return type(error).__name__.encode(errors="replace")
    return None


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):  # the program may have put anything there
            stream.flush()


def _arrange(output: int, report: int, finished: int) -> tuple[int, int, int]:
    """Put the standard streams and the two pipes in their places and close everything else."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    aside = [fcntl.fcntl(handle, fcntl.F_DUPFD, 10) for handle in (nothing, output, output, report, finished)]
    for place, handle in enumerate(aside):
        os.dup2(handle, place, inheritable=place <= 2)
    os.closerange(len(aside), 256)
    return 1, 3, 4


def confine(job: dict) -> None:
    """Take this process's rights away, in the order in which they are needed no longer.

    Raises:
        OSError: the kernel refuses a step.
    """
    layers, user = job["layers"], job["user"]
    work = root.WORK if "mount" in layers else job["folder"]
    os.chdir(work)
    os.environ.update(HOME=work, TMPDIR=work, PYTHONDONTWRITEBYTECODE="1")
    sys.dont_write_bytecode = True
    _limit(job["limits"], job["tasks"])
    rules = landlock.prepare(job["readable"], [work, "/dev/null"]) if "landlock" in layers else None
    if "account" in layers:
        library = _LibraryHandle()
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        library.use_if_needed()
    if sys.platform == "linux":
        linux.die_with_parent()
        linux.drop_capabilities()
        linux.forbid_new_privileges()
    if rules is not None:
        landlock.enforce(rules)
    if "seccomp" in layers:
        seccomp.install(signals="pid" in layers)


class _LibraryHandle:
    """A way to Python's standard library that stays open when its path does not.

    Root's Python may lie in a folder that no other user can enter. A handle leads there all the same.
    """

    def __init__(self) -> None:
        self.folder = os.path.dirname(os.__file__)
        self.handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)

    def use_if_needed(self) -> None:
        """Import from the handle from now on, if the library cannot be reached by its path."""
        if os.access(os.__file__, os.R_OK):
            os.close(self.handle)
            return
        sys.path[:] = map(self._moved, sys.path)
        for module in list(sys.modules.values()):
            if hasattr(module, "__path__"):
                module.__path__ = [self._moved(path) for path in module.__path__]

    def _moved(self, path: str) -> str:
        return path.replace(self.folder, f"/proc/self/fd/{self.handle}", 1)


def _limit(limits: dict, tasks: int) -> None:
    """Set the kernel's limits; `tasks` that this user has already do not count against the program."""
    cpu = limits["cpu_seconds"]
    wanted = {
        "AS": (limits["memory_bytes"], limits["memory_bytes"]),
        "CPU": (cpu, cpu + 1),
        "NPROC": (limits["processes"] + tasks, limits["processes"] + tasks),
        "FSIZE": (limits["file_bytes"], limits["file_bytes"]),
        "NOFILE": (64, 64),
        "CORE": (0, 0),
        "MEMLOCK": (0, 0),
        "MSGQUEUE": (0, 0),
    }
    for name, (soft, hard) in wanted.items():
        if (kind := getattr(resource, f"RLIMIT_{name}", None)) is None:
            continue
        allowed = resource.getrlimit(kind)[1]
        if allowed != resource.RLIM_INFINITY:
            soft, hard = min(soft, allowed), min(hard, allowed)
        try:
            resource.setrlimit(kind, (soft, hard))
        except ValueError:
            if sys.platform == "linux":  # macOS refuses some; its missing guards are named
                raise
