import os

import pytest

from hiplora.evaluation.sandbox.inside.stage import Pipes
from hiplora.evaluation.sandbox.inside.watch import Watch

LIMITS = {"seconds": 60, "cpu_seconds": 60, "memory_bytes": 2**40, "processes": 1000, "output_bytes": 50_000}


@pytest.fixture
def ended():
    """Watch a program that wrote this output, reported this end and is gone."""
    opened = []

    def watch(output=b"", report=b"ended 0 0.1", finished=b"token"):
        pipes = Pipes()
        for pipe, text in ((pipes.output, output), (pipes.report, report), (pipes.finished, finished)):
            os.write(pipe[1], text)
        pipes.keep(supervisor=True)
        opened.extend((pipes.output[0], pipes.report[0], pipes.finished[0], pipes.go[1]))
        found = Watch({"limits": LIMITS, "parent": os.getppid(), "layers": []}, pipes, os.getpid())
        found.until_end()
        return found.outcome(b"token")

    yield watch
    for handle in opened:
        os.close(handle)


def test_output_that_is_still_under_way_at_the_end_is_taken(ended):
    assert ended(output=b"x" * 40_000 + b"the end")["output"].endswith("the end")
    assert ended(output=b"x" * 60_000)["status"] == "too much output"


@pytest.mark.parametrize(
    ("report", "finished", "status", "detail"),
    [
        (b"ended 0 0.1", b"token", "passed", ""),
        (b"ended 0 0.1", b"tokentoken", "passed", ""),  # a fork of it came to the end as well
        (b"ended 0 0.1", b"", "failed", "left with exit status 0 before its end"),
        (b"ended 0 0.1", b"guess", "failed", "guess before its end"),
        (b"ended 768 0.1", b"token", "failed", "left with exit status 3 before its end"),
        (b"ended 256 0.1", b"ValueError", "failed", "ValueError before its end"),
        (b"ended 256 0.1", b"out of memory", "out of memory", "MemoryError"),
        (b"ended 24 59.9", b"", "timed out", "after 60 s of processor time"),  # SIGXCPU
        (b"ended 9 61.0", b"", "timed out", "after 60 s of processor time"),  # ignored SIGXCPU, then SIGKILL
        (b"ended 9 1.0", b"", "killed", "signal SIGKILL"),
        (b"ended 11 1.0", b"token", "killed", "signal SIGSEGV"),
        (b"", b"token", "killed", "with the process that looks after it"),
    ],
)
def test_an_end_is_judged(ended, report, finished, status, detail):
    outcome = ended(report=report, finished=finished)
    assert (outcome["status"], outcome["detail"]) == (status, detail)
