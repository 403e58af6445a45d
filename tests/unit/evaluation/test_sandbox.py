"""Programs that try to get out of the sandbox, and what becomes of ordinary ones."""

import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest

from hiplora.errors import ConfigError
from hiplora.evaluation import sandbox
from hiplora.evaluation.sandbox import Isolation, Limits, Outcome, isolation, run_program

MIB = 1 << 20
in_bubblewrap = pytest.mark.skipif(
    not isolation().bubblewrap, reason="bubblewrap is not installed or cannot make namespaces"
)


def run(source, **limits):
    return run_program(source, replace(Limits(), **limits))


@pytest.fixture(params=[pytest.param("bubblewrap", marks=in_bubblewrap), "rlimits"])
def either(request, monkeypatch):
    """Run programs by both ways of this machine, one after the other."""
    if request.param == "rlimits":
        monkeypatch.setattr(sandbox, "isolation", lambda: Isolation(False, None, "a test"))
    return run


def test_a_program_passes_only_if_it_runs_to_its_end(either, monkeypatch):
    assert either("print('hello')") == Outcome("passed", "hello\n")
    for source in ("assert False", "import sys; sys.exit(0)", "this is no Python"):
        assert either(source).status == "failed"
    assert "AssertionError" in either("assert False").output
    late = "import atexit\natexit.register(print, 'bye')\nassert True"
    assert either(late) == Outcome("passed", "bye\n")  # last words follow the end
    monkeypatch.setenv("HIPLORA_SECRET", "do not tell")
    outcome = either("import os\nassert os.listdir() == []\nopen('x', 'w').write('x')\nprint(*os.environ)")
    assert outcome.passed, outcome
    assert "HIPLORA_SECRET" not in outcome.output


def test_time_on_the_clock_and_of_the_processor_is_limited(either):
    start = time.monotonic()
    assert either("import time\ntime.sleep(60)", seconds=0.5).status == "timed out"
    assert either("import os\nos.kill(os.getpid(), 19)", seconds=0.5).status == "timed out"
    assert either("while True: pass", cpu_seconds=1).status == "timed out"
    assert time.monotonic() - start < 20


def test_memory_files_and_output_are_limited(either):
    assert "MemoryError" in either("x = bytearray(2**30)", memory_bytes=256 * MIB).output
    assert "OSError" in either("open('x', 'wb').write(bytes(2**21))", file_bytes=MIB).output
    endless = either("import os\nwhile True: os.write(1, b'x' * 4096)", file_bytes=MIB)
    assert endless.status == "failed"
    assert len(endless.output) <= 4096


def test_children_end_with_the_program(either, tmp_path):
    mark = f"hiplora-{tmp_path.name}-{os.getpid()}"
    child = f"[sys.executable, '-c', 'import time; time.sleep(60)', {mark!r}]"
    assert either(f"import subprocess, sys\nsubprocess.Popen({child})").passed
    deadline = time.monotonic() + 5
    while any(mark in (process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])):
        assert time.monotonic() < deadline
        time.sleep(0.05)


# What a program may try that reaches out of the sandbox: each raises OSError, or else prints OUT. PORT is one that
# this machine listens on, MINE a file of the caller that everybody may read and write.
ESCAPES = {
    "files": """
for path in (MINE, '../' * 20 + MINE[1:], '/etc/passwd', '/etc/shadow', '/home', '/var', '/sys/kernel',
             '/dev/mem', '/proc/1/cwd/../etc', '/proc/self/cwd/../etc/passwd'):
    attempt(lambda: os.listdir(path) if os.path.isdir(path) else open(path).read())
""",
    "writing": """
for path in (MINE, MINE + '.new', '../' * 20 + MINE[1:], os.__file__, '/dev/shm/x', '/usr/x', '/proc/sys/fs/x'):
    attempt(lambda: open(path, 'a'))
attempt(lambda: os.symlink(os.path.dirname(MINE), 'link') or open('link/new', 'w'))
attempt(lambda: os.link(MINE, 'hard'))
attempt(lambda: os.mkdir('/new'))
""",
    "environment": """
attempt(lambda: 'secret' in open('/proc/1/environ').read() or os.environ['HIPLORA_SECRET'])
attempt(lambda: [fd for fd in os.listdir('/proc/self/fd') if int(fd) > 3][0])
""",
    "network": """
attempt(lambda: socket.create_connection(('127.0.0.1', PORT), 1))
attempt(lambda: socket.create_connection(('1.1.1.1', 53), 1))
attempt(lambda: socket.getaddrinfo('localhost', PORT) and socket.getaddrinfo('pypi.org', 443))
attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('1.1.1.1', 53)))
attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP))
attempt(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
""",
    "privileges": """
os.getuid() or print('OUT')
attempt(lambda: os.setuid(0))
attempt(lambda: os.chroot('/usr'))
attempt(lambda: socket.sethostname('x'))
calls = {272: (0x10000000,), 165: (b'x', b'/tmp', b'tmpfs', 0, 0), 155: (b'/', b'/'), 167: (b'/x', 0), 170: (b'x', 1),
         175: (0, 0, b''), 308: (0, 0), 304: (0, 0, 0), 321: (0, 0, 0)}  # unshare, mount, pivot_root … bpf of x86-64
for number, arguments in calls.items():
    attempt(lambda: 1 / (libc.syscall(number, *arguments) == 0))
""",
}
PREAMBLE = """
import ctypes, os, socket
libc, MINE, PORT = ctypes.CDLL(None), {mine!r}, {port}
def attempt(work):
    try:
        work()
    except (OSError, KeyError, IndexError, ZeroDivisionError):
        return
    import inspect; print('OUT', inspect.currentframe().f_back.f_lineno)
"""


@in_bubblewrap
@pytest.mark.parametrize("kind", list(ESCAPES))
def test_nothing_gets_out_of_the_sandbox(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("HIPLORA_SECRET", "a secret")
    tmp_path.chmod(0o777)
    mine = tmp_path / "mine"
    mine.write_text("as it was")
    mine.chmod(0o666)
    with socket.create_server(("127.0.0.1", 0)) as server:
        preamble = PREAMBLE.format(mine=str(mine), port=server.getsockname()[1])
        outcome = run(preamble + ESCAPES[kind], seconds=20)
    assert (outcome.passed, outcome.output) == (True, "")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert mine.read_text() == "as it was"


FORGERIES = {
    "exit at once": "import os; os._exit(0)",
    "another program": "import os; os.execv('/bin/true', ['true'])",
    "a word for the end": "import os\nos.write(1, b'0' * 32)\nos.write(2, b'0' * 32)",
    "an exception hook": "import sys, os; sys.excepthook = lambda *_: os._exit(0)",
    "no assertions": "import builtins; builtins.AssertionError = type('E', (SystemExit,), {})",
    "an end of its own": "class E:\n    def __del__(self): import os; os._exit(0)\ne = E()",
    "killing its parent": "import os, signal; os.kill(os.getppid(), signal.SIGTERM)",
    "closed output": "import os; os.close(1); os.close(2)",
    "threads": "import threading, os; threading.Thread(target=lambda: os._exit(0)).start()",
    "deep recursion": "f = lambda: f()\nf()",
    "strange source": "\x00",
}


@pytest.mark.parametrize("kind", list(FORGERIES))
def test_a_failing_program_cannot_say_that_it_passed(kind):
    assert run(f"{FORGERIES[kind]}\nassert 1 == 2", seconds=10).status == "failed"


@in_bubblewrap
def test_all_files_together_are_limited_and_other_processes_neither_seen_nor_signalled():
    source = "for i in range(8): open(f'{i}', 'wb').write(bytes(2**20))"
    assert "No space left" in run(source, file_bytes=4 * MIB).output
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as other:
        assert run(f"import os\nos.kill({other.pid}, 9)").status == "failed"
        assert other.poll() is None
        other.kill()
    seen = run("import os\nprint(len([name for name in os.listdir('/proc') if name.isdigit()]))")
    assert int(seen.output) <= 3


@in_bubblewrap
def test_a_fork_bomb_stays_small(monkeypatch):
    """As root it takes a Python that the user nobody can read: the kernel does not limit root's processes."""
    if not isolation().processes:
        if not shutil.which("python3", path="/usr/bin"):
            pytest.skip("the only Python is in a folder of root's")
        monkeypatch.setattr(sandbox, "_python", lambda: ["/usr/bin/python3", "-I", "-S"])
        monkeypatch.setattr(sandbox, "isolation", lambda: Isolation(True, 65534))
    source = """
import os, time
count = 0
try:
    while count < 500:
        os.fork() or time.sleep(60)
        count += 1
except OSError:
    print(count)
"""
    outcome = run(source, processes=8, seconds=10)
    assert outcome.passed, outcome
    assert int(outcome.output) < 8


def test_permission_is_asked_and_the_fallback_is_visible(monkeypatch, caplog):
    with pytest.raises(ConfigError, match="--allow-code-execution"):
        sandbox.require_permission(False)
    monkeypatch.setattr(sandbox, "isolation", lambda: Isolation(False, None, "bwrap is not on PATH"))
    with pytest.raises(ConfigError, match="use the network"):
        sandbox.require_permission(False)
    sandbox.require_permission(True)
    assert "bubblewrap is not used (bwrap is not on PATH)" in caplog.text


def test_where_namespaces_are_forbidden_the_fallback_says_so(monkeypatch, tmp_path):
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    tmp_path.chmod(0o755)
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: name)
    monkeypatch.setattr(sandbox, "_bubblewrap", lambda limits: [str(tmp_path / "bwrap")])
    how = isolation.__wrapped__()
    assert not how.bubblewrap
    assert "No permissions to create new namespace" in str(how)
