"""How far models moved from the base, run by run: a table of means, and ratios between methods."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hiplora.reporting.study.spec import Measurement, Table
from hiplora.study.engine.jobs import Job
from hiplora.study.protocols.show import NONE, cell, marked, measurement
from hiplora.study.results import Results, drift
from hiplora.study.statistics import Estimate, by_seed, geometric, spread

Drifts = Mapping[str, Mapping[str, Sequence[float]]]  # method → text → KL of every run in nats a token


def drifts(runs: Mapping[str, Sequence[Job]], results: Results) -> Drifts:
    """Return the drift of every run of each method; of a method whose runs are not all there, nothing.

    The runs of all methods are in one order, seed after seed: the i-th ones are compared with each other.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for method, jobs in runs.items():
        values: dict[str, list[float]] = {}
        done = [results.get(job) for job in jobs]
        for result in done if None not in done else ():
            for text, kl in drift(result or {}).items():
                values.setdefault(text, []).append(kl)
        found[method] = values
    return found


def drift_table(found: Drifts, name: str, title: str, over: str) -> Table:
    """Return the table of the mean drifts; `over` says what they are the mean of."""
    texts = list(dict.fromkeys(text for values in found.values() for text in values))
    lines = [
        (method, [cell(_thousandths(values[t]), digits=2) if t in values else NONE for t in texts])
        for method, values in found.items()
        if values
    ]
    note = (
        f"KL divergence from the base model in thousandths of a nat a token, mean over {over}; lower is better. The "
        "geometric means of the paired ratios stand among the measurements."
    )
    best = dict.fromkeys(range(len(texts)), "low")
    return Table(name, title, ["Method", *texts], marked(lines, best), note)


def drift_measurements(
    found: Drifts,
    runs: Mapping[str, Sequence[Job]],
    name: str,
    seeds: int,
    shared: bool = False,
    **setting: Any,
) -> Iterator[Measurement]:
    """Yield each method's mean drift by text, and the geometric mean of its ratios to every method before it.

    Spreads and intervals are over the means of the seeds: runs of one seed are not independent of each other. There
    are none where runs of different seeds are not either, because they are of `shared` adapters.
    """
    before: list[str] = []
    for method, values in found.items():
        for text, kl in values.items():
            means = by_seed(kl, seeds).mean(axis=1).tolist()
            mean = Estimate(float(np.mean(kl)), sd=None if shared else spread(means))
            told = {"text": text, **setting}
            yield measurement(
                name, method, "drift", mean, runs[method], unit="nats/token", setting=told, seeds=seeds
            )
            for other in before:
                others = found[other].get(text)
                if not others or min(*kl, *others) <= 0:
                    continue
                apart = np.log(by_seed(kl, seeds)) - np.log(by_seed(others, seeds))
                ratio = geometric(np.exp(apart.mean(axis=1)).tolist())
                if shared:
                    ratio = Estimate(ratio.value)
                yield measurement(
                    name, method, "drift ratio", ratio, [*runs[method], *runs[other]], unit="ratio",
                    setting={**told, "over": other}, seeds=seeds,
                )  # fmt: skip
        before.append(method)


def _thousandths(values: Sequence[float]) -> Estimate:
    return Estimate(1000 * float(np.mean(values)))
