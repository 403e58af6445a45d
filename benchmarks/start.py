"""How long `import hiplora` and `hiplora --help` take, side by side with `import peft`.

    python benchmarks/start.py [--rounds 9] [--json FILE]

Each round starts a fresh process for each, in an order that rotates; the ratio is the median of the rounds' ratios.
"""

import statistics
import subprocess
import sys

from side_by_side import options, timed, turns, write

COMMANDS = {
    "import peft": ["-c", "import peft"],
    "import hiplora": ["-c", "import hiplora"],
    "hiplora --help": ["-m", "hiplora", "--help"],
}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn, name in turns([*COMMANDS], args.rounds + 1):
        command = [sys.executable, *COMMANDS[name]]
        spent = timed(lambda command=command: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))[1]
        if turn:  # the first warms the disk
            seconds[name].append(spent["seconds"])
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = [ours / peft for ours, peft in zip(seconds["import hiplora"], seconds["import peft"], strict=True)]
    for name, median in medians.items():
        print(f"{name:16}{median:7.2f} s")
    print(f"import hiplora / import peft: {statistics.median(ratios):.2f}")
    write(args.json, {"benchmark": "start", "seconds": medians, "ratio_hiplora_peft": statistics.median(ratios)})


if __name__ == "__main__":
    main()
