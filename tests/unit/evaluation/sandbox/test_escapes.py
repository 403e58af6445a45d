"""Programs that mean harm, behind every wall that should stop them, alone where it stands alone."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hiplora.errors import HipLoraError
from hiplora.evaluation.sandbox import run_program
from hiplora.evaluation.sandbox.isolation import active_layers
from tests.unit.evaluation.sandbox.conftest import behind, eventually

MIB = 2**20
BOUNDED = ("every guard", "limits only")


@behind(*BOUNDED)
@pytest.mark.parametrize("loop", ["while True: pass", "import time\nwhile True: time.sleep(9)"])
def test_an_endless_loop_is_stopped_by_the_clock(walled, loop):
    outcome = walled(f"print('begun', flush=True)\n{loop}", seconds=0.5)
    assert (outcome.status, outcome.detail) == ("timed out", "after 0.5 s on the clock")
    assert outcome.output == "begun\n"
    assert 0.5 <= outcome.seconds < 3


@behind("every guard")
def test_an_endless_loop_is_stopped_by_the_processors_time(walled):
    outcome = walled("while True: pass", cpu_seconds=1, seconds=60)
    assert (outcome.status, outcome.detail) == ("timed out", "after 1 s of processor time")


@behind(*BOUNDED)
@pytest.mark.parametrize("stream", [1, 2])
def test_endless_output_is_stopped_and_only_its_end_is_kept(walled, stream):
    outcome = walled(f"import os\nwhile True: os.write({stream}, b'x' * 4096)", output_bytes=MIB)
    assert (outcome.status, outcome.detail) == ("too much output", f"more than {MIB} bytes")
    assert outcome.output == "x" * 4096


@behind(*BOUNDED)
def test_too_much_output_at_the_very_end_is_noticed(walled):
    assert walled("print('x' * 50_000)", output_bytes=10_000).status == "too much output"
    assert walled("print('x' * 9_000)", output_bytes=10_000).status == "passed"


@behind(*BOUNDED)
def test_a_memory_bomb_is_stopped(walled):
    outcome = walled("x = []\nwhile True: x.append(bytearray(2**22))", memory_bytes=256 * MIB)
    assert (outcome.status, outcome.detail) == ("out of memory", "MemoryError")


@behind(*BOUNDED)
def test_a_memory_bomb_in_many_processes_is_stopped(walled):
    source = "import os, time\nfor _ in range(2): os.fork()\nx = b'1' * (100 * 2**20)\ntime.sleep(30)"
    outcome = walled(source, memory_bytes=256 * MIB, processes=8)
    assert (outcome.status, outcome.detail) == (
        "out of memory",
        f"more than {256 * MIB} bytes in all processes",
    )


@behind("every guard", "no namespaces")
def test_memory_cannot_hide_outside_of_processes(walled):
    assert "Error" in walled("import os\nos.memfd_create('x')").detail
    source = "import ctypes\nassert ctypes.CDLL(None).shmget(0, 4096, 0o1600) == -1"
    assert walled(source).passed


@behind("every guard")
def test_all_files_together_are_bounded(walled):
    source = "for i in range(8): open(f'{i}', 'wb').write(bytes(2**20))"
    assert "No space left" in walled(source, file_bytes=4 * MIB).output


@behind(*BOUNDED)
def test_a_file_is_bounded(walled):
    outcome = walled("open('x', 'wb').write(bytes(2**21))", file_bytes=MIB)
    assert outcome.detail == "OSError before its end"


@behind("every guard", "no namespaces")
def test_a_fork_bomb_stays_small_and_leaves_nothing(walled, marked):
    bomb = "for _ in range(8):\n    try: os.fork()\n    except OSError: pass\ntime.sleep(60)"  # 256, not more
    counts, over = [], threading.Event()

    def count():
        while not over.is_set():
            counts.append(len(marked.alive()))
            time.sleep(0.05)

    watcher = threading.Thread(target=count)
    watcher.start()
    outcome = walled(marked.source + bomb, processes=8, seconds=1)
    over.set()
    watcher.join()
    assert outcome.status == "timed out"
    assert 4 <= max(counts) <= 8
    assert marked.alive() == []


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="the kernel limits all users but root"
)
@behind("limits only")
def test_a_fork_bomb_that_the_kernel_does_not_limit_is_found_and_killed(walled, marked):
    outcome = walled(f"{marked.source}for _ in range(5): os.fork()\ntime.sleep(60)", processes=8)
    assert (outcome.status, outcome.detail) == ("killed", "more than 8 processes")
    assert marked.alive() == []


SURVIVOR = """
for number in (1, 2, 13, 15): signal.signal(number, signal.SIG_IGN)
begun, begin = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.close(1); os.close(2)
        os.write(begin, b"!")
        while True: time.sleep(9)
    os._exit(0)
os.read(begun, 1)
"""


@behind("every guard", "no namespaces", "limits only")
@pytest.mark.parametrize(("end", "status"), [("", "passed"), ("time.sleep(60)", "timed out")])
def test_nothing_survives_the_kill(walled, marked, end, status):
    assert walled(f"{marked.source}{SURVIVOR}\n{end}", seconds=0.5).status == status
    assert marked.alive() == []


@behind("every guard", "no namespaces", "limits only")
def test_a_process_that_keeps_forking_away_does_not_survive(walled, marked):
    run_away = "if os.fork() == 0:\n    while True:\n        if os.fork(): os._exit(0)\ntime.sleep(60)"
    walled(marked.source + run_away, seconds=0.5, processes=8)
    assert marked.alive() == []


@behind("every guard", "mount namespace", "Landlock")
def test_nothing_is_written_outside(walled, tmp_path):
    tmp_path.chmod(0o777)
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    kept.chmod(0o666)
    attempts = [
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"open({str(kept)!r}, 'w')",
        f"open({os.__file__!r}, 'a')",
        f"open({'../' * 20 + str(tmp_path / 'new').lstrip('/')!r}, 'w')",
        f"os.symlink({str(tmp_path)!r}, 'link') or open('link/new', 'w')",
        f"os.truncate({str(kept)!r}, 0)",
        f"os.mkdir({str(tmp_path / 'folder')!r})",
        f"os.rename({str(kept)!r}, {str(kept) + '2'!r})",
        f"os.remove({str(kept)!r})",
    ]
    assert succeeding(walled, attempts) == []
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "as it was"


@behind("every guard", "mount namespace", "Landlock")
def test_files_outside_are_not_read(walled, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "secret").chmod(0o644)
    paths = [str(tmp_path / "secret"), "/etc/passwd", f"/proc/{os.getpid()}/maps"]
    attempts = [f"open({path!r}).read()" for path in paths]
    assert succeeding(walled, attempts) == []


def succeeding(walled, attempts):
    """Let a program try all of it; return what it could do."""
    source = f"""
import os
for attempt in {attempts!r}:
    try:
        eval(attempt)
    except OSError:
        continue
    print(attempt)
"""
    outcome = walled(source)
    assert outcome.passed, outcome
    return outcome.output.splitlines()


@behind("every guard", "no namespaces", "mount namespace", "Landlock", "own user account")
def test_the_callers_environment_is_out_of_reach(walled, monkeypatch):
    # The kernel shows the environment that a process began with, so the secret is in one that holds it for us.
    monkeypatch.setenv("HIPLORA_SECRET", "do not tell")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as holder:
        assert eventually(lambda: b"do not tell" in Path(f"/proc/{holder.pid}/environ").read_bytes())
        assert walled("import os\nassert 'HIPLORA_SECRET' not in os.environ").passed
        for pid in (holder.pid, os.getpid()):
            assert "Error" in walled(f"open('/proc/{pid}/environ', 'rb').read()").detail
        holder.communicate(b"\n")


def test_the_environment_holds_nothing_of_the_callers(monkeypatch):
    monkeypatch.setenv("HIPLORA_SECRET", "do not tell")
    known = {
        "PATH",
        "HOME",
        "TMPDIR",
        "LANG",
        "LC_CTYPE",
        "PYTHONHASHSEED",
        "PYTHONDONTWRITEBYTECODE",
        "LD_LIBRARY_PATH",
    }
    outcome = run_program("import os\nprint(*os.environ)")
    assert set(outcome.output.split()) <= known


@behind("every guard", "no namespaces", "network namespace", "system call filter")
def test_no_socket_reaches_this_machines_own_services(walled):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        port = server.getsockname()[1]
        source = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2).send(b'x')"
        assert walled(source).status == "failed"
        with pytest.raises(BlockingIOError):
            server.accept()
        socket.create_connection(("127.0.0.1", port)).close()  # it was there to be reached


@behind("every guard", "no namespaces", "system call filter")
def test_no_kind_of_socket_opens(walled):
    source = """
import socket
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, socket.AF_VSOCK):
    try:
        socket.socket(family, socket.SOCK_DGRAM)
    except PermissionError:
        continue
    raise AssertionError(family)
"""
    outcome = walled(source)
    assert outcome.passed, outcome


@behind("every guard", "no namespaces", "process namespace", "system call filter", "own user account")
def test_other_processes_get_no_signals(walled):
    if walled.layers == {"account"} and "account" not in active_layers():
        pytest.skip("only root has another account to give")
    with subprocess.Popen(["sleep", "60"]) as other:
        outcome = walled(f"import os\nos.kill({other.pid}, 15)")
        assert outcome.detail in ("PermissionError before its end", "ProcessLookupError before its end")
        time.sleep(0.05)
        assert other.poll() is None
        other.kill()


@behind("every guard", "no namespaces", "system call filter")
def test_new_namespaces_and_tracing_are_refused(walled):
    source = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
new_user = 0x10000000
clone = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
for call, error in (
    (lambda: libc.unshare(new_user), errno.EPERM),
    (lambda: libc.syscall(clone, new_user | 17, 0, 0, 0, 0), errno.EPERM),
    (lambda: libc.syscall(435, None, 0), errno.ENOSYS),
    (lambda: libc.ptrace(0, 0, 0, 0), errno.EPERM),
):
    assert call() == -1 and ctypes.get_errno() == error
"""
    outcome = walled(source)
    assert outcome.passed, outcome


@behind("every guard", "no namespaces")
def test_a_program_has_no_rights_of_root(walled):
    source = "import os\nassert os.getuid() != 0 and os.getgid() != 0\nos.setuid(0)"
    outcome = walled(source)
    # The kernel refuses, or root does not even exist in there.
    assert outcome.detail in ("PermissionError before its end", "OSError before its end"), outcome


@behind("every guard", "no namespaces")
def test_a_killed_supervisor_takes_the_program_along(walled, marked):
    count = 2 if "pid" in walled.layers else 1  # without the namespace, the program's own children stay
    source = marked.source + f"if {count} == 2 and os.fork() == 0:\n    os.setsid()\ntime.sleep(60)"

    def shoot():
        assert eventually(lambda: len(marked.alive()) == count)
        for child in (
            Path(f"/proc/self/task/{threading.main_thread().native_id}/children").read_text().split()
        ):
            if b"supervisor" in Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(int(child), 9)

    killer = threading.Thread(target=shoot)
    killer.start()
    with pytest.raises(HipLoraError, match="ended with status -9"):
        walled(source)
    killer.join()
    assert eventually(lambda: not marked.alive(), seconds=5)
