"""Programs that try to get out of the sandbox, and what becomes of ordinary ones."""

import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hiplora.errors import ConfigError
from hiplora.evaluation import sandbox
from hiplora.evaluation.sandbox import Isolation, Limits, isolation, run_program

MIB = 1 << 20
in_bubblewrap = pytest.mark.skipif(
    not isolation().bubblewrap, reason="bubblewrap is not installed or cannot make namespaces"
)


def run(source, **limits):
    return run_program(source, replace(Limits(), **limits))


@pytest.fixture(params=["bubblewrap", "rlimits"])
def either(request, monkeypatch):
    """Run programs by both ways of this machine, one after the other."""
    if request.param == "bubblewrap" and not isolation().bubblewrap:
        pytest.skip("bubblewrap is not installed or cannot make namespaces")
    if request.param == "rlimits":
        monkeypatch.setattr(sandbox, "isolation", lambda: Isolation(False, None, "a test"))
    return run


def test_a_program_passes_only_if_it_runs_to_its_end(either):
    assert either("print('hello')").passed
    assert either("print('hello')").output == "hello\n"
    for source in ("assert False", "import sys; sys.exit(0)", "import os; os._exit(0)", "this is no Python"):
        assert either(source).status == "failed"
    assert "AssertionError" in either("assert False").output


def test_time_on_the_clock_and_of_the_processor_is_limited(either):
    start = time.monotonic()
    assert either("import time\ntime.sleep(60)", seconds=0.5).status == "timed out"
    assert either("while True: pass", cpu_seconds=1).status == "timed out"
    assert time.monotonic() - start < 20


def test_memory_files_and_output_are_limited(either):
    assert "MemoryError" in either("x = bytearray(2**30)", memory_bytes=256 * MIB).output
    assert "OSError" in either("open('x', 'wb').write(bytes(2**21))", file_bytes=MIB).output
    endless = either("import os\nwhile True: os.write(1, b'x' * 4096)", file_bytes=MIB)
    assert endless.status == "failed"
    assert len(endless.output) <= 4096


def test_a_program_sees_an_empty_folder_of_its_own_and_no_environment(either, monkeypatch):
    monkeypatch.setenv("HIPLORA_SECRET", "do not tell")
    source = "import os\nassert os.listdir() == []\nopen('x', 'w').write('x')\nprint(*os.environ)"
    outcome = either(source)
    assert outcome.passed, outcome
    assert "HIPLORA_SECRET" not in outcome.output


def test_children_end_with_the_program(either, tmp_path):
    mark = f"hiplora-{tmp_path.name}-{os.getpid()}"
    child = f"[sys.executable, '-c', 'import time; time.sleep(60)', {mark!r}]"
    assert either(f"import subprocess, sys\nsubprocess.Popen({child})").passed

    def alive():
        return [p for p in Path("/proc").glob("[0-9]*/cmdline") if mark.encode() in _read(p)]

    deadline = time.monotonic() + 5
    while alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive()


def _read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


@in_bubblewrap
def test_nothing_outside_is_read_or_written(tmp_path):
    tmp_path.chmod(0o777)
    secret = tmp_path / "secret"
    secret.write_text("as it was")
    secret.chmod(0o666)
    attempts = [
        f"open({str(secret)!r}).read()",
        "open('/etc/passwd').read()",
        f"open({__file__!r}).read()",
        f"open({str(secret)!r}, 'w')",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"open({'../' * 20 + str(tmp_path / 'new').lstrip('/')!r}, 'w')",
        f"open({os.__file__!r}, 'a')",
        f"os.symlink({str(tmp_path)!r}, 'link') or open('link/new', 'w')",
        f"os.remove({str(secret)!r})",
        f"os.listdir({os.path.expanduser('~/.ssh')!r})",
        "open('/dev/shm/x', 'w')",
        "os.mkdir('/new')",
    ]
    outcome = run(
        f"import os\nfor attempt in {attempts!r}:\n"
        "    try:\n        eval(attempt)\n    except OSError:\n        continue\n    print(attempt)"
    )
    assert (outcome.passed, outcome.output) == (True, "")
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    assert secret.read_text() == "as it was"


@in_bubblewrap
def test_all_files_together_are_limited():
    source = "for i in range(8): open(f'{i}', 'wb').write(bytes(2**20))"
    assert "No space left" in run(source, file_bytes=4 * MIB).output


@in_bubblewrap
def test_the_network_is_out_of_reach():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        port = server.getsockname()[1]
        outcome = run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)")
        assert outcome.status == "failed"
        with pytest.raises(BlockingIOError):
            server.accept()
        socket.create_connection(("127.0.0.1", port)).close()  # it was there to be reached
    interfaces = run("import socket\nprint([name for _, name in socket.if_nameindex()])").output
    assert interfaces.strip() in ("['lo']", "[]")


@in_bubblewrap
def test_other_processes_are_neither_seen_nor_signalled():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as other:
        assert run(f"import os\nos.kill({other.pid}, 9)").status == "failed"
        assert other.poll() is None
        other.kill()
    seen = run("import os\nprint(len([name for name in os.listdir('/proc') if name.isdigit()]))")
    assert int(seen.output) <= 3


@in_bubblewrap
def test_a_program_has_no_rights_of_root_and_makes_no_namespaces():
    new_user_namespace = "ctypes.CDLL(None).unshare(0x10000000)"
    outcome = run(f"import ctypes, os\nassert os.getuid() != 0\nassert {new_user_namespace} != 0\nos.setuid(0)")
    assert outcome.status == "failed"
    assert "AssertionError" not in outcome.output


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
        if os.fork() == 0:
            time.sleep(60)
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
    found = shutil.which
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: str(tmp_path / name) if name == "bwrap" else found(name))
    monkeypatch.setattr(sandbox, "_bubblewrap", lambda limits: [str(tmp_path / "bwrap")])
    isolation.cache_clear()
    try:
        how = isolation()
    finally:
        isolation.cache_clear()
    assert not how.bubblewrap
    assert "No permissions to create new namespace" in str(how)
