"""A file system for the program: Python and the system's libraries to read, one empty folder to write."""

import os
import re
import sys

from hiplora.evaluation.sandbox.inside import linux

WORK = "/tmp"  # the program's folder in the new file system
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")

_SYSTEM = (
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/nix/store",
    "/gnu/store",
)
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT = 1, 2, 4, 32
_MS_BIND, _MS_REC, _MS_PRIVATE = 1 << 12, 1 << 14, 1 << 18
_MNT_DETACH = 2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
# Flags of a mounted file system as statvfs tells them, and as mount wants them back: they may not be dropped.
_KEPT_FLAGS = {1: 1, 2: 2, 4: 4, 8: 8, 1024: 1024, 2048: 2048, 4096: 1 << 21}


def readable_paths() -> list[str]:
    """List what this interpreter needs to run, without paths that lie in others of the list."""
    wanted = {*_SYSTEM, sys.base_prefix, sys.base_exec_prefix, *_library_folders()}
    wanted |= {
        os.path.realpath(path) for path in wanted
    }  # a link is shown as a link, so its end is needed too
    found: list[str] = []
    for path in sorted(wanted - {"/", ""}):
        if os.path.exists(path) and not any(path.startswith(f"{other}/") for other in found):
            found.append(path)
    return found


def _library_folders() -> set[str]:
    """Return the folders of the shared libraries that are loaded now."""
    with open("/proc/self/maps") as maps:
        fields = (line.split(maxsplit=5) for line in maps)
        return {
            os.path.dirname(field[5].strip()) for field in fields if len(field) == 6 and field[5][0] == "/"
        }


def enter(folder: str, readable: list[str], size: int) -> None:
    """Make a new file system on `folder` and move into it; the rest of the machine's is out of reach.

    Needs a mount namespace of its own. `size` bounds all that is written, in bytes. /proc is left out.

    Raises:
        OSError: the kernel refuses a step.
    """
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", folder, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755,size=1m")
    work = folder + WORK
    os.mkdir(work)
    _mount("tmpfs", work, "tmpfs", _MS_NOSUID | _MS_NODEV, f"mode=1777,size={size},nr_inodes=4096")
    for path in (*readable, *filter(os.path.exists, DEVICES)):
        _show(path, folder)
    os.symlink(WORK, folder + "/dev/shm")  # where the C library keeps shared memory and semaphores
    for mounted in _mounted_below(folder):
        if mounted != work and mounted.removeprefix(folder) not in DEVICES:
            flags = _kept_flags(mounted) | _MS_RDONLY | _MS_NOSUID | _MS_NODEV
            _mount(None, mounted, None, _MS_REMOUNT | _MS_BIND | flags)
    _pivot(folder)


def _show(path: str, folder: str) -> None:
    """Make `path` of the machine visible at the same place below `folder`, with all that is mounted in it."""
    place = folder + path
    os.makedirs(os.path.dirname(place), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), place)
        return
    if os.path.isdir(path):
        os.makedirs(place, exist_ok=True)
    else:
        os.close(os.open(place, os.O_CREAT))
    _mount(path, place, None, _MS_BIND | _MS_REC)


def _mounted_below(folder: str) -> list[str]:
    """List the mount points at and below `folder`."""
    with open("/proc/self/mountinfo") as table:
        points = [re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), row.split()[4]) for row in table]
    return [point for point in points if point == folder or point.startswith(f"{folder}/")]


def _kept_flags(mounted: str) -> int:
    found = os.statvfs(mounted).f_flag
    return sum(flag for told, flag in _KEPT_FLAGS.items() if found & told)


def _pivot(folder: str) -> None:
    os.chdir(folder)
    here = (linux.ctypes.c_char * 2)(b".", b"\0")
    linux.syscall("pivot_root", _PIVOT_ROOT[os.uname().machine], here, here)
    linux.call("umount2", b".", _MNT_DETACH)
    os.chdir("/")


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    def text(value: str | None) -> bytes | None:
        return None if value is None else os.fsencode(value)

    try:
        linux.call("mount", text(source), os.fsencode(target), text(kind), flags, text(options))
    except OSError as error:
        raise OSError(error.errno, f"mount {target}: {os.strerror(error.errno or 0)}") from None
