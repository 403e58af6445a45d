"""A filter on system calls: no sockets, no new namespaces, no reach into other processes, no hidden memory."""

import errno
import os
import struct
import sys

from hiplora.evaluation.sandbox.inside import linux

# Forbidden calls, as (x86_64, aarch64). `socketpair` stays: asyncio needs it and it leads nowhere.
_FORBIDDEN = {
    "socket": (41, 198),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425),
    "userfaultfd": (323, 282),
    # Memory that belongs to no process, so that no limit counts it.
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
}
_SIGNALS = {
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
}
_PIDFD_SEND_SIGNAL = (424, 424)
_CLONE = (56, 220)
_CLONE3 = (435, 435)

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000  # the bit that marks calls of x86_64's other convention, with numbers of its own
_NEW_NAMESPACES = 0x7E020000  # all CLONE_NEW* flags

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = (
    0,
    4,
    16,
)  # offsets in struct seccomp_data; low word on both machines
_ALLOW = 0x7FFF0000
_REFUSE = 0x00050000 | errno.EPERM
_UNKNOWN = 0x00050000 | errno.ENOSYS  # the C library then uses the older call


def install(signals: bool) -> None:
    """Filter the system calls of this process and of all that it starts.

    Args:
        signals: whether it may send signals to others. Without namespaces these others would be all the user's
            processes; then each process may signal none but the one that installed the filter, itself.

    Raises:
        OSError: the kernel has no filters, or none is written for this kind of processor.
    """
    linux.install_filter(_filter(os.uname().machine, None if signals else os.getpid()))


def _filter(machine: str, only_pid: int | None) -> bytes:
    if machine not in _ARCHITECTURES or sys.byteorder != "little":
        raise OSError(errno.ENOSYS, f"no filter of system calls is written for {machine} processors")
    column = list(_ARCHITECTURES).index(machine)
    text = _instruction(_LOAD, _ARCHITECTURE)
    text += _instruction(_EQUAL, _ARCHITECTURES[machine], 1, 0) + _instruction(_RETURN, _REFUSE)
    text += _instruction(_LOAD, _NUMBER)
    if machine == "x86_64":
        text += _instruction(_AT_LEAST, _X32, 0, 1) + _instruction(_RETURN, _REFUSE)
    for numbers in _FORBIDDEN.values():
        text += _answer(numbers[column], _REFUSE)
    text += _answer(_CLONE3[column], _UNKNOWN)
    text += _refuse_if(_CLONE[column], _ANY_BIT, _NEW_NAMESPACES, met=True)
    if only_pid is not None:
        text += _answer(_PIDFD_SEND_SIGNAL[column], _REFUSE)
        for numbers in _SIGNALS.values():
            text += _refuse_if(numbers[column], _EQUAL, only_pid, met=False)
    return text + _instruction(_RETURN, _ALLOW)


def _instruction(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, operand)


def _answer(number: int, answer: int) -> bytes:
    return _instruction(_EQUAL, number, 0, 1) + _instruction(_RETURN, answer)


def _refuse_if(number: int, test: int, operand: int, met: bool) -> bytes:
    """Refuse call `number` if the test of its first argument comes out as `met`; else allow it."""
    skip = (0, 1) if met else (1, 0)
    return (
        _instruction(_EQUAL, number, 0, 4)
        + _instruction(_LOAD, _FIRST_ARGUMENT)
        + _instruction(test, operand, *skip)
        + _instruction(_RETURN, _REFUSE)
        + _instruction(_RETURN, _ALLOW)
    )
