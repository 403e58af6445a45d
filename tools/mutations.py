"""Feed the readers damaged files: each must read them, or refuse with one of hiplora's own errors, in time.

    python -m tools.mutations [--inputs 10000] [--seed 0] [--only recipe] [--out docs/results/mutations.csv]

A mutation flips bits, cuts, doubles or inserts bytes, or puts an extreme value in a number's or a word's place. Store
entries must give the right factors whatever is in their file. What goes wrong is printed with its seed.
"""

import argparse
import csv
import gzip
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import yaml

from hiplora import HipLoraConfig
from hiplora.adapters import read_update
from hiplora.data.examples import load_examples
from hiplora.errors import HipLoraError
from hiplora.evaluation.suite import read_suite
from hiplora.spectral import FactorStore
from hiplora.study.jobs import Job
from hiplora.study.recipe import load_study, own_studies
from hiplora.study.store import Store
from hiplora.training import load_recipe
from hiplora.training.trainer import HASHES_FILE, last_checkpoint
from tests.tiny import tiny_llama, write_jsonl

LIMIT = 20  # seconds
EXTREMES = b'null -1 0 1e999 NaN [] {} "" 99999999999999999999 true \xff [['.split()
Read = Callable[[], Any]


class Hang(BaseException):
    """A reader that takes too long."""


def mutated(raw: bytes, chance: random.Random) -> bytes:
    """Return a damaged copy of a file's bytes."""
    data = bytearray(raw)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        at = chance.randrange(len(data) + 1)
        head = chance.random() < 0.5  # where the headers of binary files are
        at = min(at, chance.randrange(400)) if head else at
        span = chance.choice((1, 2, 8, 40, len(data) // 3))
        kind = chance.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[at : at + span]
        elif kind == 2:
            data[at:at] = data[at : at + span]
        elif kind == 3:
            data[at:at] = chance.randbytes(chance.choice((1, 4, 16)))
        elif kind == 4:
            del data[at:]
        else:
            words = list(re.finditer(rb"-?\d[\d.e-]*|\"[^\"\n]*\"|\b\w+\b", bytes(data[:20_000])))
            if words:
                word = chance.choice(words)
                data[word.start() : word.end()] = chance.choice(EXTREMES)
    return bytes(data)


def recipe(folder: Path) -> tuple[Path, Read]:
    """A training recipe with most of its fields."""
    write_jsonl(folder / "rows.jsonl", [{"prompt": f"{n}?", "completion": f"{n}."} for n in range(6)])
    data, method = {"path": "rows.jsonl", "held_out_fraction": 0.1}, {"name": "hiplora", "r": 8, "preset": "paper"}
    method |= {"principal_rank": 16, "target_modules": ["q_proj"]}
    fields = {"model": "smollm2-135m", "data": data, "method": method, "train": {"steps": 10, "lr": 1e-3}, "out": "x"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(fields, sort_keys=False))
    return folder / "recipe.yaml", lambda: load_recipe(folder / "recipe.yaml")


def study(folder: Path) -> tuple[Path, Read]:
    """A study's recipe."""
    shutil.copy(own_studies()["pico"], folder / "study.yaml")
    return folder / "study.yaml", lambda: load_study(folder / "study.yaml")


def rows(folder: Path) -> tuple[Path, Read]:
    """Training rows: a conversation and a prompt, in JSON lines."""
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    write_jsonl(folder / "rows.jsonl", [{"messages": talk}] * 3 + [{"messages": [*talk, *talk]}])
    return folder / "rows.jsonl", lambda: load_examples(folder / "rows.jsonl")


def table(folder: Path) -> tuple[Path, Read]:
    """Training rows, as CSV."""
    (folder / "rows.csv").write_text("prompt,completion\n" + "a,b\n" * 4)
    return folder / "rows.csv", lambda: load_examples(folder / "rows.csv")


def _adapter(folder: Path) -> None:
    made = HipLoraConfig(preset="paper", r=2, principal_rank=2, target_modules=["q_proj"], layers_to_transform=[0])
    peft.get_peft_model(tiny_llama(), made).save_pretrained(folder)


def configuration(folder: Path) -> tuple[Path, Read]:
    """An adapter's adapter_config.json."""
    _adapter(folder)
    return folder / "adapter_config.json", lambda: read_update(folder)


def tensors(folder: Path) -> tuple[Path, Read]:
    """An adapter's tensors, with their header."""
    _adapter(folder)
    return folder / "adapter_model.safetensors", lambda: read_update(folder)


def entry(folder: Path) -> tuple[Path, Read]:
    """An entry of the factor store."""
    weight = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
    right = FactorStore(folder).get_or_compute(weight, 2)

    def read() -> None:
        found = FactorStore(folder).get_or_compute(weight, 2)
        assert all(torch.equal(getattr(found, name), getattr(right, name)) for name in ("U", "sigma", "V"))

    return next(folder.rglob("*.safetensors")), read


def checkpoint(folder: Path) -> tuple[Path, Read]:
    """The hashes of a checkpoint's files."""
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "state.json").write_text("{}")
    known = '{"state.json": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}'
    (folder / "checkpoint-2" / HASHES_FILE).write_text(known)
    return folder / "checkpoint-2" / HASHES_FILE, lambda: last_checkpoint(folder)


def tasks(folder: Path) -> tuple[Path, Read]:
    """A suite of evaluation tasks."""
    listed = ("gsm8k", "{task: mmlu, limit: 10}", "{task: arc_easy | arc_challenge, limit: 5}")
    (folder / "suite.yaml").write_text("tasks:\n" + "".join(f"  - {one}\n" for one in listed) + "include: []\n")
    return folder / "suite.yaml", lambda: read_suite(str(folder / "suite.yaml"))


def result(folder: Path) -> tuple[Path, Read]:
    """A study's record of a job."""
    job, store = Job("collect", 1, "one", {"n": 1}, {}), Store(folder)
    store.finish(job, {"value": 3, "scores": [1, 2]}, {"seconds": 1.5}, artifact=False)
    file = next((folder / "results").glob("*.json"))
    return file, lambda: Store(folder).result(job)


def records(folder: Path, name: str = "records.jsonl.gz") -> tuple[Path, Read]:
    """Records of a study that are reused elsewhere, gzipped."""
    job, store, file = Job("collect", 1, "one", {"n": 1}, {}), Store(folder / "first"), folder / name
    store.finish(job, {"value": 3}, {"seconds": 1.5}, artifact=False)
    store.export([job], file)
    if file.suffix != ".gz":
        file.write_bytes(gzip.decompress(file.read_bytes()))

    def read() -> Any:
        other = Store(folder / "second")
        shutil.rmtree(other.path, ignore_errors=True)
        other.take(file)
        return other.result(job)

    return file, read


def plain_records(folder: Path) -> tuple[Path, Read]:
    """The same, unpacked."""
    return records(folder, "records.jsonl")


INPUTS = (recipe, study, rows, table, configuration, tensors, entry, checkpoint, tasks, result, records, plain_records)


def tried(file: Path, raw: bytes, read: Read, chance: random.Random) -> tuple[str, str]:
    """Damage a file and read it; return what came of it, and the traceback of what was wrong."""

    def stop(*_: Any) -> None:
        raise Hang

    file.write_bytes(mutated(raw, chance))
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        read()
        return "read", ""
    except HipLoraError as error:
        return ("refused", "") if str(error) else ("wrong", "an error without a message")
    except (Hang, Exception):
        return "wrong", traceback.format_exc()
    finally:
        signal.alarm(0)


def main() -> int:
    """Run all inputs and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="a kind of input; repeatable")
    parser.add_argument("--out", type=Path, default=Path("docs/results/mutations.csv"))
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    lines, wrong = [], 0
    kinds = [make for make in INPUTS if not given.only or make.__name__ in given.only]
    for make in kinds:
        counts, seen = Counter[str](), set[str]()
        with tempfile.TemporaryDirectory() as folder:
            os.environ["HIPLORA_CACHE"] = folder + "/cache"
            file, read = make(Path(folder))
            raw = file.read_bytes()
            for number in range(-(-given.inputs // len(kinds))):
                how, why = tried(file, raw, read, random.Random(f"{given.seed} {make.__name__} {number}"))
                counts[how] += 1
                if why and (last := why.strip().splitlines()[-1][:60]) not in seen:
                    seen.add(last)
                    print(f"{make.__name__}, input {number}: {why}", flush=True)
        wrong += counts["wrong"]
        meaning = (make.__doc__ or make.__name__).split(": ")[0].rstrip(".")
        lines.append((meaning, counts.total(), counts["read"], counts["refused"], counts["wrong"]))
        print(*lines[-1], sep=", ", flush=True)
    with given.out.open("w", encoding="utf-8", newline="") as out:
        header = ("Input", "Damaged", "Read all the same", "Refused", "Traceback, hang or wrong")
        csv.writer(out, lineterminator="\n").writerows([header, *lines])
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
