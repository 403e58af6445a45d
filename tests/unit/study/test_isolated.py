import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hiplora.errors import DataError, HipLoraError
from hiplora.study.isolated import run_isolated

JOBS = "isolated_jobs"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"


def eventually(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_work_is_done_in_another_process_and_leaves_standard_output_alone(tmp_path, capfd):
    run_isolated(f"{JOBS}:write", {"path": str(tmp_path / "x"), "text": "Grüße"})
    text, pid = (tmp_path / "x").read_text().split()
    assert text == "Grüße"
    assert int(pid) != os.getpid()
    said = capfd.readouterr()
    assert said.out == ""
    assert "noise" in said.err


def test_an_error_that_is_meant_for_the_user_comes_back_as_itself():
    with pytest.raises(DataError, match=r"^rows\.jsonl, line 3: no$"):
        run_isolated(f"{JOBS}:wrong_data", {})
    with pytest.raises(OSError, match="No space left on device"):
        run_isolated(f"{JOBS}:full_disk", {})


def test_a_bug_shows_its_traceback_and_is_a_failure(capfd):
    with pytest.raises(HipLoraError, match="failed with status 1"):
        run_isolated(f"{JOBS}:broken", {})
    assert "TypeError: a bug" in capfd.readouterr().err


def test_a_process_that_is_killed_is_explained():
    with pytest.raises(
        HipLoraError, match=r"signal 9, most often for lack of memory.*run the same command again"
    ):
        run_isolated(f"{JOBS}:killed", {})


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_its_caller(tmp_path, how):
    arguments = {"path": str(tmp_path / "pid")}
    script = f"from hiplora.study.isolated import run_isolated as r\nr('{JOBS}:wait', {arguments!r})"
    caller = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    assert eventually(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text())
    caller.send_signal(how)
    caller.wait(timeout=30)
    assert eventually(lambda: gone(int((tmp_path / "pid").read_text())))
