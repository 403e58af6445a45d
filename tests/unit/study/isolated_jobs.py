"""Functions that the tests of isolated work run in another process."""

import os
import signal
import sys
import time
from pathlib import Path

from hiplora.errors import DataError


def write(path, text):
    print("noise on standard output")
    Path(path).write_text(f"{text} {os.getpid()}")


def wrong_data():
    raise DataError("rows.jsonl, line 3: no")


def full_disk():
    raise OSError(28, "No space left on device", "out/x")


def broken():
    raise TypeError("a bug")


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def wait(path):
    Path(path).write_text(str(os.getpid()))
    time.sleep(60)
    sys.exit(0)
