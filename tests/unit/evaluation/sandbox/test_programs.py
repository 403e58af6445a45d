"""What becomes of programs that mean no harm, and of those that only want to be counted as right."""

import os
import signal
import subprocess
import sys
import tempfile

import pytest

from hiplora.errors import ConfigError, HipLoraError
from hiplora.evaluation.sandbox import Limits, batch, run_program, run_programs
from hiplora.evaluation.sandbox.batch import run_batch
from tests.unit.evaluation.sandbox.conftest import behind, eventually

SIMPLE = ("every guard", "no namespaces", "limits only")
MIB = 2**20


@behind(*SIMPLE)
def test_a_program_passes_when_it_comes_to_its_end(walled):
    outcome = walled("def add(a, b):\n    return a + b\nassert add(1, 2) == 3\nprint('Grüße')")
    assert (outcome.status, outcome.output, outcome.detail) == ("passed", "Grüße\n", "")
    assert outcome.passed
    assert 0 < outcome.seconds < 5


@behind("every guard", "no namespaces")
@pytest.mark.parametrize(
    "source",
    [
        "import asyncio\nasync def one(): return 1\nassert asyncio.run(one()) == 1",
        "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
        "import subprocess, sys\nassert subprocess.run(['/bin/echo', 'hi'], capture_output=True).stdout == b'hi\\n'",
        "from dataclasses import dataclass\nimport pickle\n@dataclass\nclass A:\n    x: int\n"
        "assert pickle.loads(pickle.dumps(A(1))) == A(1)",
        "import decimal, sqlite3, zoneinfo, csv, heapq, encodings.idna, collections.abc\n'ß'.encode('utf-16')",
        "import tempfile\nwith tempfile.TemporaryFile() as f: f.write(b'x')\nopen('here', 'w').write('x')",
        "import os, time\nif os.fork() == 0:\n    os._exit(1)\nos.wait()",
    ],
    ids=["asyncio", "thread", "command", "pickle", "imports", "files", "fork"],
)
def test_what_programs_of_the_standard_library_do_works(walled, source):
    outcome = walled(source)
    assert outcome.passed, outcome


@behind("every guard", "limits only")  # the machine's /dev/shm is closed by Landlock alone
def test_multiprocessing_works(walled):
    start = "import multiprocessing as m\nq = m.Queue()\np = m.Process(target=q.put, args=(1,))\np.start()\n"
    outcome = walled(start + "assert q.get() == 1\np.join()")
    assert outcome.passed, outcome


def test_a_failing_program_says_why():
    outcome = run_program("print('before')\nassert 1 + 1 == 3, 'sum'")
    assert outcome.status == "failed"
    assert outcome.detail == "AssertionError before its end"
    assert outcome.output.startswith("before\nTraceback")
    assert outcome.output.endswith("AssertionError: sum\n")
    assert "hiplora" not in outcome.output


@pytest.mark.parametrize("source", ["def f(:\n", "\0", "'\ud800'", "(" * 1000], ids=repr)
def test_what_is_no_python_fails(source):
    assert run_program(source).status == "failed"


@behind("every guard")
@pytest.mark.parametrize(
    "leave",
    [
        "exit(0)",
        "quit()",
        "import sys; sys.exit()",
        "import os; os._exit(0)",
        "raise SystemExit(0)",
        "import os; os.execv('/bin/true', ['true'])",
        "import atexit; atexit.register(print)\nimport sys; sys.exit(0)",
        "import os\nif os.fork(): os._exit(0)",
        "import os\nfor handle in range(3, 64):\n    try: os.write(handle, b'passed')\n    except OSError: pass\n"
        "os._exit(0)",
        "import os\nos.kill(os.getpid(), 9)",
    ],
)
def test_leaving_before_the_tests_is_no_success(walled, leave):
    assert not walled(f"{leave}\nassert False").passed


def test_a_program_that_leaves_is_told_from_one_that_fails():
    assert run_program("import os; os._exit(0)").detail == "left with exit status 0 before its end"
    assert run_program("import sys; sys.exit(0)").detail == "SystemExit before its end"
    assert run_program("import os; os.kill(os.getpid(), 11)").detail == "signal SIGSEGV"
    assert run_program("import os; os.kill(os.getpid(), 11)").status == "killed"


def test_command_line_blocks_do_not_run_and_input_is_empty():
    assert run_program("if __name__ == '__main__':\n    raise ValueError").passed
    assert run_program("import sys\nassert sys.stdin.read() == '' and sys.argv == ['solution']").passed


def test_what_depends_on_hashes_comes_out_the_same_every_time():
    orders = {outcome.output for outcome in run_programs(["print({str(i) for i in range(50)})"] * 3)}
    assert len(orders) == 1


@behind("every guard", "limits only")
def test_a_program_gets_a_new_and_empty_folder_that_does_not_stay(walled, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source = """
import os
assert os.listdir('.') == []
assert os.environ['HOME'] == os.environ['TMPDIR'] == os.getcwd()
os.mkdir('a')
open('a/b', 'w').close()
os.chmod('a', 0)
if os.getcwd() != '/tmp': os.chmod('.', 0)
"""
    for _ in range(2):
        outcome = walled(source)
        assert outcome.passed, outcome
    assert list(tmp_path.iterdir()) == []


def test_outcomes_come_in_the_order_of_the_programs_and_progress_counts_them():
    done = []
    sources = [f"import time\ntime.sleep({0.4 - 0.2 * i})\nprint({i})" for i in range(3)] + ["fail"]
    outcomes = run_programs(sources, workers=3, progress=done.append)
    assert [outcome.output for outcome in outcomes[:3]] == ["0\n", "1\n", "2\n"]
    assert [outcome.passed for outcome in outcomes] == [True, True, True, False]
    assert done == [1, 2, 3, 4]
    assert run_programs([]) == []


@pytest.mark.parametrize("workers", [1, 3])
def test_as_many_programs_run_at_the_same_time_as_there_are_workers(monkeypatch, workers):
    running, most = set(), []

    class Counted(batch.Sandbox):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            running.add(self)
            most.append(len(running))

        def close(self):
            super().close()
            running.discard(self)

    monkeypatch.setattr(batch, "Sandbox", Counted)
    assert len(run_programs(["pass"] * 5, workers=workers)) == 5
    assert max(most) == workers
    assert not running


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seconds", 0),
        ("cpu_seconds", -1),
        ("processes", 2.5),
        ("memory_bytes", MIB),
        ("seconds", float("nan")),
    ],
)
def test_a_limit_that_cannot_be_is_refused_by_its_name(name, value):
    with pytest.raises(ConfigError, match=rf"{name} is {value}"):
        Limits(**{name: value})


def test_no_workers_is_a_mistake():
    with pytest.raises(ConfigError, match="workers is 0"):
        run_programs(["pass"], workers=0)


def test_a_sandbox_that_cannot_be_made_is_an_error_and_no_failure_of_the_program():
    with pytest.raises(HipLoraError, match="could not be set up"):
        run_batch(["pass"], Limits(), ["a moat"])


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@behind("every guard", "limits only")
def test_no_program_and_no_folder_outlives_the_caller(walled, how, marked, tmp_path):
    source = (
        marked.source + "if os.fork() == 0: os.setsid()\nsignal.signal(15, signal.SIG_IGN)\ntime.sleep(100)"
    )
    script = (
        "from hiplora.evaluation.sandbox.batch import run_batch\n"
        "from hiplora.evaluation.sandbox.limits import Limits\n"
        f"run_batch([{source!r}] * 2, Limits(seconds=60), {sorted(walled.layers)!r}, workers=2)\n"
    )
    caller = subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "TMPDIR": str(tmp_path)}, stderr=subprocess.DEVNULL
    )
    assert eventually(lambda: len(marked.alive()) == 4)
    caller.send_signal(how)
    caller.wait(timeout=30)
    assert eventually(lambda: not marked.alive())
    assert eventually(lambda: not list(tmp_path.iterdir()))
