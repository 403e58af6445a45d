"""Calls into the Linux kernel that Python's standard library lacks."""

import ctypes
import os
import signal

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

_PR_SET_PDEATHSIG = 1
_PR_SET_SECCOMP = 22
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def call(function: str, *arguments: int | bytes | ctypes.Array | ctypes.Structure | None) -> int:
    """Call a function of the C library; integers go as machine words, structures by reference.

    Raises:
        OSError: the call failed; the message names the function.
    """
    converted = [_convert(argument) for argument in arguments]
    result = getattr(_libc, function)(*converted)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{function}: {os.strerror(error)}")
    return result


def syscall(name: str, number: int, *arguments: int | ctypes.Array | ctypes.Structure | None) -> int:
    """Make a system call by its number, with the errors of `call`; they carry `name`."""
    try:
        return call("syscall", number, *arguments)
    except OSError as error:
        raise OSError(error.errno, f"{name}: {os.strerror(error.errno or 0)}") from None


def _convert(argument):
    if isinstance(argument, int):
        return ctypes.c_long(argument)
    if isinstance(argument, (ctypes.Array, ctypes.Structure)):
        return ctypes.byref(argument)
    return argument


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends; a change of user undoes this."""
    call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent has ended."""
    call("prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def forbid_new_privileges() -> None:
    """Let no program that this process executes gain rights, whatever its file says."""
    call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def drop_capabilities() -> None:
    """Give up every special right of this process."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    call("capset", header, nothing)


def counts_processes_by_namespace() -> bool:
    """Whether a user namespace has its own count of processes (Linux 5.14), or shares the user's."""
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int(minor)) >= (5, 14)


def install_filter(instructions: bytes) -> None:
    """Have a seccomp program judge every later system call of this process and its children."""
    text = ctypes.create_string_buffer(instructions, len(instructions))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))

    program = Program(len(instructions) // 8, ctypes.addressof(text))
    call("prctl", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0)
