"""The paired bootstrap: its time against a straightforward one, and how often its intervals hold the truth.

    python benchmarks/bootstrap.py [--rounds 7] [--datasets 2000] [--json FILE]

Time: 3 seeds × 200 instances × 8 methods at 10,000 replicates, one thread; each round runs both in turn, and the
ratio is the median of the per-round ratios. The straightforward one draws indices and gathers values with numpy.

Coverage: the share of simulated data sets whose 95 % interval of a mean holds the true one. Instances deviate from
their seed's mean by 1 and seeds from the true mean by so much that either source, or both, make up the error; in one
case all seeds are scored on the same items.
"""

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import functools
import statistics

import numpy as np
from side_by_side import options, timed, write

from hiplora.metrics import paired_bootstrap

SEEDS, INSTANCES, METHODS, REPLICATES = 3, 200, 8, 10_000

# Name: seeds, instances a seed, deviation of seeds in units of a seed mean's error from its instances, same items.
CASES = {
    "one seed": (1, 100, 0.0, False),
    "three seeds, alike": (3, 100, 0.0, False),
    "three seeds, as much as instances": (3, 100, 1.0, False),
    "three seeds, three times as much": (3, 100, 3.0, False),
    "three seeds, seeds alone": (3, 100, 1e6, False),
    "five seeds, three times as much": (5, 100, 3.0, False),
    "ten seeds, three times as much": (10, 100, 3.0, False),
    "thirty seeds, three times as much": (30, 100, 3.0, False),
    "three seeds, alike, same items": (3, 100, 0.0, True),
}


def gather_bootstrap(values: dict[str, list[list[float]]], replicates: int, seed: int) -> np.ndarray:
    """The straightforward one: a loop over replicates, indices drawn and values gathered."""
    table = np.array(list(values.values()))
    generator = np.random.default_rng(seed)
    _, seeds, instances = table.shape
    means = np.empty((replicates, len(table)))
    for replicate in range(replicates):
        drawn = generator.integers(seeds, size=seeds)
        items = generator.integers(instances, size=(seeds, instances))
        means[replicate] = table[:, drawn[:, None], items].mean(axis=(1, 2))
    differences = means[:, :, None] - means[:, None, :]
    return np.quantile(np.concatenate([means[:, :, None], differences], axis=2), (0.025, 0.975), axis=0)


def time_both(rounds: int) -> dict:
    """Seconds of both, in turn, and the ratio."""
    generator = np.random.default_rng(0)
    values = {f"method {i}": generator.normal(50, 10, (SEEDS, INSTANCES)).tolist() for i in range(METHODS)}
    seconds: dict[str, list[float]] = {"hiplora": [], "gather": []}
    for _ in range(rounds):
        for name, run in (("hiplora", paired_bootstrap), ("gather", gather_bootstrap)):
            seconds[name].append(timed(functools.partial(run, values, REPLICATES, 0))[1]["seconds"])
    ratios = [g / h for g, h in zip(seconds["gather"], seconds["hiplora"], strict=True)]
    return {
        "rounds": rounds,
        "seconds": {name: statistics.median(found) for name, found in seconds.items()},
        "seconds_fastest": {name: min(found) for name, found in seconds.items()},
        "ratio_gather_hiplora": statistics.median(ratios),
    }


def coverage(case: tuple[int, int, float, bool], datasets: int, replicates: int) -> float:
    """Share of data sets whose interval holds the true mean, 0."""
    seeds, instances, deviation, same_items = case
    generator, held = np.random.default_rng(0), 0
    for index in range(datasets):
        values = generator.normal(0, 1, (1 if same_items else seeds, instances))
        seed_means = generator.normal(0, deviation / instances**0.5, (seeds, 1))
        found = paired_bootstrap({"method": values + seed_means}, replicates, index).mean["method"]
        held += found.low <= 0 <= found.high
    return held / datasets


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--datasets", type=int, default=2000)
    parser.add_argument("--replicates", type=int, default=1000, help="of each data set's bootstrap")
    args = parser.parse_args()
    timing = time_both(args.rounds)
    seconds = timing["seconds"]
    print(f"{SEEDS} × {INSTANCES} × {METHODS}, {REPLICATES} replicates: {seconds['hiplora']:.3f} s,", end=" ")
    print(f"by gathering {seconds['gather']:.3f} s ({timing['ratio_gather_hiplora']:.1f} times)")
    covered = {}
    for name, case in CASES.items():
        covered[name] = coverage(case, args.datasets, args.replicates)
        print(f"coverage, {name}: {100 * covered[name]:.1f} %")
    setting = {"seeds": SEEDS, "instances": INSTANCES, "methods": METHODS, "replicates": REPLICATES}
    setting |= {"datasets": args.datasets, "replicates_of_datasets": args.replicates}
    write(args.json, {"benchmark": "bootstrap", "setting": setting, "timing": timing, "coverage": covered}, seed=0)


if __name__ == "__main__":
    main()
