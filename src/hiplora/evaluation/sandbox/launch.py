"""One program in one sandbox: start its supervisor, take its answer, leave nothing behind."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

from hiplora.errors import HipLoraError
from hiplora.evaluation.sandbox.limits import Limits, Outcome

_GRACE = 60.0  # seconds for all that is not the program: making the sandbox, killing what is left in it
_PATIENCE = 15.0  # seconds in which a supervisor that is told to stop has killed everything

# Parent packages are put up without running them: their imports would cost more than the program.
_START = """
import sys
sys.path[:] = [path for path in sys.path if path]
for name, folder in {packages!r}:
    package = sys.modules[name] = type(sys)(name)
    package.__path__ = [folder]
from hiplora.evaluation.sandbox.inside.supervisor import main
main()
"""


class Sandbox:
    """A program on its way, isolated by the given layers (see `isolation.LAYERS`)."""

    def __init__(self, source: str, limits: Limits, layers: Collection[str]) -> None:
        self.deadline = time.monotonic() + limits.seconds + _GRACE
        self.folder = os.path.realpath(tempfile.mkdtemp(prefix="hiplora-sandbox-"))
        job = {
            "source": source,
            "limits": asdict(limits),
            "layers": sorted(layers),
            "folder": self.folder,
            "parent": os.getpid(),
        }
        try:
            with tempfile.TemporaryFile() as request:
                request.write(json.dumps(job).encode())
                request.seek(0)
                self.process = self._start(request.fileno())
        except BaseException:
            self._clean()
            raise

    def _start(self, request: int) -> subprocess.Popen:
        return subprocess.Popen(
            [_interpreter(), "-S", "-s", "-X", "utf8", "-c", _START.format(packages=_packages())],
            stdin=request,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self.folder,
            env=_environment(),
            start_new_session=True,
        )

    def fileno(self) -> int:
        """Return the handle that can be read when the program is done."""
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def outcome(self) -> Outcome:
        """Return what became of the program, which is done.

        Raises:
            HipLoraError: the sandbox could not be made as its layers say.
        """
        assert self.process.stdout is not None
        text = self.process.stdout.read()
        self.process.wait()
        try:
            answer = json.loads(text)
        except ValueError:
            why = text[-2000:].decode(errors="replace").strip()
            answer = {"error": why or f"its supervisor ended with status {self.process.returncode}"}
        if "error" in answer:
            raise HipLoraError(f"the code sandbox could not be set up: {answer['error']}")
        return Outcome(**answer)

    def close(self) -> None:
        """End what still runs and remove the folder; once is enough, twice does no harm."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._clean()

    def _clean(self) -> None:
        with contextlib.suppress(OSError):
            os.chmod(self.folder, 0o700)
        # Folders that the program closed to everybody, itself included; no process is left to swap them for links.
        for parent, folders, _ in os.walk(self.folder):
            for path in (Path(parent, name) for name in folders):
                if not path.is_symlink():
                    with contextlib.suppress(OSError):
                        path.chmod(0o700)
        shutil.rmtree(self.folder, ignore_errors=True)


def _interpreter() -> str:
    """Return the Python under any virtual environment: nothing that is installed there is meant for programs."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _packages() -> list[tuple[str, str]]:
    """Name the packages above `inside`, with their folders."""
    folder = Path(__file__).resolve().parent
    names = ("hiplora.evaluation.sandbox", "hiplora.evaluation", "hiplora")
    return [(name, str(place)) for name, place in zip(names, [folder, *folder.parents], strict=False)]


def _environment() -> dict[str, str]:
    kept = {
        name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ
    }  # for Python itself
    return {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", **kept}
