"""Landlock: the program reads what Python needs and writes to its own folder, wherever the file system ends."""

import ctypes
import os
from collections.abc import Iterable

from hiplora.evaluation.sandbox.inside import linux

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION = 1
_PATH_BENEATH = 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_TRUNCATE, _IOCTL = 1 << 14, 1 << 15
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_ON_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL
_NO_TCP = 0b11  # bind and connect
_NO_SIGNALS_OUT = 0b11  # nor abstract Unix sockets


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scope", ctypes.c_uint64))


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def prepare(readable: Iterable[str], writable: Iterable[str]) -> int:
    """Return a handle on rules that allow these paths, with all that lies beneath, and nothing else.

    The paths must be open to this process; `enforce` needs no rights.

    Raises:
        OSError: the kernel has no Landlock.
    """
    version = linux.syscall("landlock_create_ruleset", _CREATE_RULESET, None, 0, _VERSION)
    rights = _file_rights(version)
    rules = _Ruleset(rights, _NO_TCP, _NO_SIGNALS_OUT)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = linux.syscall("landlock_create_ruleset", _CREATE_RULESET, rules, size, 0)
    for paths, allowed in ((readable, _READ), (writable, rights)):
        for path in paths:
            _allow(ruleset, path, allowed & rights)
    return ruleset


def enforce(ruleset: int) -> None:
    """Hold this process, and all that it starts, to the rules from now on."""
    linux.syscall("landlock_restrict_self", _RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _file_rights(version: int) -> int:
    """Return every right over files that this version of Landlock can withhold."""
    count = 13 if version < 2 else 14 if version < 3 else 15 if version < 5 else 16
    return (1 << count) - 1


def _allow(ruleset: int, path: str, allowed: int) -> None:
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    if not os.path.isdir(path):
        allowed &= _ON_FILES
    linux.syscall("landlock_add_rule", _ADD_RULE, ruleset, _PATH_BENEATH, _Beneath(allowed, handle), 0)
    os.close(handle)
