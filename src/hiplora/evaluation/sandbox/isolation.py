"""Which guards this machine gives the sandbox, found by trying them, and the leave to run code at all."""

import functools
import os
import sys
from dataclasses import dataclass

from hiplora.errors import ConfigError, HipLoraError
from hiplora.evaluation.sandbox.batch import run_batch
from hiplora.evaluation.sandbox.limits import Limits

# The layers of isolation, each with its name and what it stops. Limits on time, memory, processes, files and output
# are no layers: they hold always.
LAYERS = {
    "user": ("user namespace", "rights outside of the sandbox; the other namespaces build on it"),
    "mount": ("mount namespace", "reading and writing files outside of an empty temporary folder"),
    "pid": ("process namespace", "seeing other processes, and surviving the kill"),
    "network": ("network namespace", "any network, this machine's own services included"),
    "ipc": ("IPC namespace", "shared memory and queues of other processes"),
    "account": ("own user account", "root's rights over files and processes, and fork bombs"),
    "seccomp": ("system call filter", "sockets, new namespaces, reach into other processes, hidden memory"),
    "landlock": ("Landlock", "the files, secrets and processes of others, where namespaces do not"),
}
_TRIAL = "import decimal, json, math, random"


@dataclass(frozen=True)
class Guard:
    """A layer of isolation: its name, what it stops, whether it is active here and, if not, why."""

    layer: str
    name: str
    stops: str
    active: bool
    reason: str = ""


@functools.cache
def guards() -> tuple[Guard, ...]:
    """Return every guard that could matter on this machine; each is tried once, which takes a second at most.

    Raises:
        HipLoraError: the sandbox runs nowhere near here (Windows), or not even without guards.
    """
    reasons = _why_missing()
    return tuple(
        Guard(layer, name, stops, layer not in reasons, reasons.get(layer, ""))
        for layer, (name, stops) in LAYERS.items()
        if layer != "account" or _is_root()
    )


def active_layers() -> frozenset[str]:
    """Return the layers that `run_programs` uses."""
    return frozenset(guard.layer for guard in guards() if guard.active)


def missing_guards() -> tuple[Guard, ...]:
    """Return the guards that this machine does not give."""
    return tuple(guard for guard in guards() if not guard.active)


def require_permission(allowed: bool) -> None:
    """Refuse to go on unless the user agreed that code of a model runs on this machine.

    Raises:
        ConfigError: the user did not; the message says what would and would not protect the machine.
    """
    if allowed:
        return
    active = ", ".join(guard.name for guard in guards() if guard.active) or "none"
    missing = "".join(
        f"\n  - {guard.name} ({guard.reason}): stops {guard.stops}" for guard in missing_guards()
    )
    raise ConfigError(
        "this runs code that the model writes on this machine; pass --allow-code-execution if you want that.\n"
        "It runs in a sandbox with limits on time, memory, processes and output. "
        f"Guards that are active here: {active}.\n"
        + (f"Guards that are missing here:{missing}" if missing else "No guard is missing here.")
    )


def _is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def _why_missing() -> dict[str, str]:
    """Map each layer that cannot be had to the reason."""
    if sys.platform != "linux":
        run_batch([_TRIAL], Limits(), ())  # at least this must work
        return dict.fromkeys(LAYERS, "needs Linux")
    wanted = [layer for layer in LAYERS if layer != "account" or _is_root()]
    if not _problem(wanted):
        return {}
    if why := _problem([]):
        raise HipLoraError(f"the code sandbox does not work here: {why}")
    reasons: dict[str, str] = {}
    usable: list[str] = []
    for layer in wanted:  # in this order: the namespaces need the first
        if why := _problem([*usable, layer]):
            reasons[layer] = why
        else:
            usable.append(layer)
    return reasons


def _problem(layers: list[str]) -> str:
    """Say what keeps a harmless program from passing under these layers; nothing if it does pass."""
    try:
        [outcome] = run_batch([_TRIAL], Limits(seconds=30, cpu_seconds=30), layers)
    except HipLoraError as error:
        return str(error).rpartition("set up: ")[2]
    return "" if outcome.passed else f"a harmless program {outcome.status}: {outcome.detail}"
