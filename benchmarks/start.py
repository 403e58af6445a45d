"""How long `import hiplora` and `hiplora --help` take, side by side with `import peft`.

    python benchmarks/start.py [--rounds 9] [--json FILE]

Each round starts a fresh process for each, in an order that rotates; the ratio is the median of the rounds' ratios.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from hiplora.files import write_atomic
from hiplora.provenance import provenance

COMMANDS = {
    "import peft": ["-c", "import peft"],
    "import hiplora": ["-c", "import hiplora"],
    "hiplora --help": ["-m", "hiplora", "--help"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    order = list(COMMANDS)
    for turn in range(args.rounds + 1):  # the first warms the disk
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            began = time.perf_counter()
            subprocess.run([sys.executable, *COMMANDS[name]], check=True, stdout=subprocess.DEVNULL)
            if turn:
                seconds[name].append(time.perf_counter() - began)
    ratios = [ours / peft for ours, peft in zip(seconds["import hiplora"], seconds["import peft"], strict=True)]
    record = {
        "benchmark": "start",
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "ratio_hiplora_peft": statistics.median(ratios),
        "provenance": provenance(),
    }
    for name, time_taken in record["seconds"].items():
        print(f"{name:16}{time_taken:7.2f} s")
    print(f"import hiplora / import peft: {record['ratio_hiplora_peft']:.2f}")
    if args.json:
        write_atomic(args.json, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
