"""Disturb the commands that write: killed, out of disk, read-only, robbed of files, two at once. Write a table.

    python -m tools.torture [--trials 10] [--seed 0] [--only train] [--how SIGKILL] [--out docs/results/torture.csv]

Each trial runs a command on a tiny model in a forked process, torments it at a random moment, and judges: it must not
show a traceback; a run that ends with 0 has the same tensors as an undisturbed run; every file that it left loads; and
the same command, repeated in peace, ends with 0 and those tensors. What is not so is printed. Rows of the table that
were measured before are replaced, the others stay.
"""

import argparse
import contextlib
import csv
import ctypes
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from hiplora.cli.main import main as hiplora
from tests.tiny import save_tiny, write_jsonl

FEW = ["rates=null", "seeds=[42]", "protocols.single_task.methods=[hiplora]", "protocols.merging=null"]
HEADER = ("Command", "Disturbance", "Trials", "Finished", "Stopped, said why", "Killed", "Wrong afterwards")
SAID = (0, 1, 2, 130, 128 + signal.SIGTERM)  # exit statuses of a command that ended by itself


class Scene:
    """A folder with a tiny model, rows, two adapters and a cache; each trial gets a copy of its own."""

    def __init__(self, folder: Path):
        self.folder, self.out, self.cache = folder, folder / "out" / "result", folder / "cache"

    def words(self, command: str) -> list[str]:
        """Return a command line."""
        model, rows = str(self.folder / "model"), str(self.folder / "rows.jsonl")
        settings = ["train.steps=6", "train.batch_size=2", "train.gradient_accumulation=1", "train.max_length=64"]
        settings += ["train.save_every=2", "method.preset=paper", "method.principal_rank=8", "train.lr=0.01"]
        first, second = (str(self.folder / name) for name in ("first", "second"))
        lines = {
            "factorize": ["factorize", model, "--rank", "8"],
            "calibrate": ["calibrate", model, "--rank", "4", "--tokens", "512"],
            "train": ["train", "--model", model, "--data", rows, *(f"--set={one}" for one in settings)],
            "merge": ["merge", first, second],
            "export": ["export", first, "--to", "lora"],
            "study": ["study", "run", "pico", *(f"--set={one}" for one in few())],
        }
        return lines[command] + (["--out", str(self.out)] if command not in ("factorize", "calibrate") else [])

    def result(self, command: str) -> dict[str, str]:
        """Return a hash of every tensor that a command left; of every job's result for a study."""
        if command == "study":
            records = [json.loads(path.read_text()) for path in (self.out / "results").glob("*.json")]
            return {record["key"]: json.dumps(record["result"]) for record in records}
        root = self.out if command not in ("factorize", "calibrate") else self.cache
        found = {}
        for path in sorted(root.rglob("*.safetensors")):
            if not any(part.startswith((".", "checkpoint")) for part in path.relative_to(root).parts):
                for name, tensor in load_file(path).items():
                    raw = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
                    found[f"{path.relative_to(root)}:{name}"] = raw
        return found


def few() -> list[str]:
    """Return the changes that leave one training, its evaluation and what they need of the study `pico`."""
    from hiplora.study.recipe import load_study

    left_out = [name for name, _ in load_study("pico").protocols if name not in ("single_task", "merging")]
    train = "{path: gsm8k_train.jsonl, held_out_fraction: 0.1, held_out_limit: 4}"
    domain = f"domains={{sums: {{title: Sums, train: {train}, tasks: {{gsm8k_reference: 4}}}}}}"
    return [domain, *FEW, *(f"protocols.{name}=null" for name in left_out)]


def start(scene: Scene, command: str, log: Path, before: Callable[[], object] = lambda: None) -> int:
    """Fork a process that runs a command; `before` is called in it first."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        os.setsid()
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.update(HIPLORA_CACHE=str(scene.cache), HOME=str(scene.folder), PYTHONWARNINGS="ignore")
        before()
        hiplora([*scene.words(command), "--json"])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def end(child: int) -> int:
    """Wait for a process; return its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def signalled(which: int) -> Callable[..., list[int]]:
    """Return a torment: a signal at a random moment."""

    def torment(scene: Scene, command: str, log: Path, chance: random.Random, seconds: float) -> list[int]:
        child = start(scene, command, log)
        time.sleep(chance.uniform(0, seconds))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, which)
        code = end(child)
        with contextlib.suppress(ProcessLookupError):  # workers of a study
            os.killpg(child, signal.SIGKILL)
        return [code]

    return torment


def full_disk(scene: Scene, command: str, log: Path, chance: random.Random, seconds: float) -> list[int]:
    """Let no file grow beyond a random size."""
    size = int(10 ** chance.uniform(2, 5.5))

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    log.touch()
    return [end(start(scene, command, log, limit))]


def read_only(scene: Scene, command: str, log: Path, chance: random.Random, seconds: float) -> list[int]:
    """Take away the right to write the output's folder, the cache or both."""
    closed = chance.choice([[scene.out.parent], [scene.cache], [scene.out.parent, scene.cache]])
    inside = [folder for root in closed for folder in (root, *(path for path in root.rglob("*") if path.is_dir()))]
    for path in inside:
        path.chmod(0o555)
    # Root writes everywhere, until it gives up its capabilities.
    version, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    code = end(start(scene, command, log, lambda: ctypes.CDLL(None).capset(version, none)))
    for path in inside:
        path.chmod(0o777)
    return [code]


def robbed(scene: Scene, command: str, log: Path, chance: random.Random, seconds: float) -> list[int]:
    """Remove a random file of the cache or of what is being written, at three random moments."""
    child = start(scene, command, log)
    for _ in range(3):
        time.sleep(chance.uniform(0, seconds / 3))
        files = [path for root in (scene.cache, scene.out.parent) for path in root.rglob("*") if path.is_file()]
        if files:
            chance.choice(files).unlink(missing_ok=True)
    return [end(child)]


def twice(scene: Scene, command: str, log: Path, chance: random.Random, seconds: float) -> list[int]:
    """Run the command in two processes, on one cache and one output."""
    first = start(scene, command, log)
    time.sleep(chance.uniform(0, seconds / 2))
    return [end(child) for child in (first, start(scene, command, log))]


TORMENTS = {
    "SIGKILL": signalled(signal.SIGKILL),
    "SIGTERM": signalled(signal.SIGTERM),
    "full disk": full_disk,
    "read-only folder": read_only,
    "files removed": robbed,
    "two processes": twice,
}


def problems(scene: Scene, command: str, torment: str, codes: list[int], log: Path, right: dict) -> Iterator[str]:
    """Yield what is wrong after a trial, then after the command's repetition in peace."""
    told = log.read_text(errors="replace") if log.exists() else ""
    if "Traceback" in told or "is a bug in hiplora" in told:
        yield f"a traceback or a bug: {told[-600:]}"
    if not all(code in (*SAID, -signal.SIGKILL, -signal.SIGTERM) for code in codes):
        yield f"exit status {codes}: {told[-300:]}"
    if any(code in (1, 2) for code in codes) and "error:" not in told:
        yield f"exit status {codes} without a message: {told[-300:]}"
    try:
        found = scene.result(command)
        if torment != "files removed" and (0 in codes and found != right):
            yield "ended with 0, but its result is another"
        if any(right.get(key) != value for key, value in found.items()):
            yield "left something else than the right result"
    except (SafetensorError, ValueError, OSError) as error:
        yield f"left a file that does not load: {error}"
    whole = scene.out.exists() and command in ("train", "merge", "export") and scene.result(command) == right
    if scene.out.exists() and command in ("merge", "export") and not whole:
        shutil.rmtree(scene.out)  # robbed
    again = log.with_suffix(".again")
    code = 0 if whole else end(start(scene, command, again))
    if code and torment == "files removed" and "error:" in again.read_text():  # it said what is wrong
        shutil.rmtree(scene.out, ignore_errors=True)
        code = end(start(scene, command, again))
    if code or scene.result(command) != right:
        yield f"repeated in peace: exit status {code}, or another result: {again.read_text()[-600:]}"
    if left := [str(path.name) for path in scene.folder.rglob("*.part*") if path.name != ".lock"]:
        yield f"left {left} behind"


def trial(stage: Path, command: str, torment: str, seed: int, seconds: float, right: dict) -> tuple[str, list[str]]:
    """Run one trial on a copy of the stage; return how the tormented run ended, and what is wrong."""
    with tempfile.TemporaryDirectory(dir=stage.parent) as folder:
        scene, log = Scene(Path(folder) / "scene"), Path(folder) / "log"
        shutil.copytree(stage, scene.folder)
        Path(folder).chmod(0o755)
        codes = TORMENTS[torment](scene, command, log, random.Random(f"{seed} {command} {torment}"), seconds)
        ended = "done" if set(codes) == {0} else "stopped" if all(code in SAID for code in codes) else "killed"
        return ended, list(problems(scene, command, torment, codes, log, right))


def record(table: Path, row: tuple) -> None:
    """Put a row into the table, in place of an older one of the same command and disturbance."""
    kept: dict[tuple[str, str], list[str]] = {}
    if table.exists():
        with table.open(encoding="utf-8", newline="") as file:
            kept = {(found[0], found[1]): found for found in list(csv.reader(file))[1:]}
    kept[row[0], row[1]] = list(map(str, row))
    with table.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([HEADER, *kept.values()])


def main() -> int:
    """Run the trials and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10, help="of each command and torment")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="a command; repeatable")
    parser.add_argument("--how", action="append", choices=TORMENTS, help="a disturbance; repeatable")
    parser.add_argument("--out", type=Path, default=Path("docs/results/torture.csv"))
    given = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch).chmod(0o755)
        stage = Scene(Path(scratch) / "stage")
        for path in (stage.out.parent, stage.cache):
            path.mkdir(parents=True)
        save_tiny(stage.folder / "model")
        write_jsonl(stage.folder / "rows.jsonl", [{"prompt": f"Say {n}: ", "completion": f"{n}."} for n in range(12)])
        for name in ("first", "second"):
            assert end(start(stage, "train", Path(scratch) / "log")) == 0, (Path(scratch) / "log").read_text()
            os.replace(stage.out, stage.folder / name)
        for command in given.only or ("factorize", "calibrate", "train", "merge", "export", "study"):
            shutil.rmtree(stage.cache)
            stage.cache.mkdir()
            begin = time.perf_counter()
            assert end(start(stage, command, Path(scratch) / "log")) == 0, (Path(scratch) / "log").read_text()
            seconds, right = time.perf_counter() - begin, stage.result(command)
            shutil.rmtree(stage.cache)
            shutil.rmtree(stage.out, ignore_errors=True)
            stage.cache.mkdir()
            for torment in given.how or TORMENTS:
                ended, found = Counter[str](), []
                for seed in range(given.seed, given.seed + given.trials):
                    how, bad = trial(stage.folder, command, torment, seed, seconds, right)
                    ended[how] += 1
                    found += [f"{command}, {torment}, seed {seed}: {one}" for one in bad]
                counts = (ended[how] for how in ("done", "stopped", "killed"))
                row = (command, torment, given.trials, *counts, len(found))
                print(*row, sep=", ", flush=True)
                print(*found, sep="\n", end="\n" * bool(found), flush=True)
                record(given.out, row)
                wrong += len(found)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
