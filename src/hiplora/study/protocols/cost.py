"""What each method costs: throughput over steady steps, peak memory, and the one-time cost of its factors (Table 5)."""

from collections.abc import Iterator
from typing import Any

import pandas as pd
from pydantic import Field

from hiplora.study.jobs import Job
from hiplora.study.protocols.settings import Done, Findings, OfMethods, Positive, Run, Study
from hiplora.study.records import joined, table
from hiplora.study.statistics import student

SHOWN = {  # metric → heading ({} is the first method), units in one of the table's, digits
    "throughput": ("Tokens per second", 1, 0),
    "throughput ratio": ("Of {}'s", 1, 3),
    "peak memory": ("Peak memory, GB", 1e9, 2),
    "peak memory ratio": ("Of {}'s memory", 1, 3),
    "factors": ("SVD minutes", 60, 2),
    "cache": ("Cache size, GB", 1e9, 4),
}
BOUNDS = ["estimate", "low", "high"]


class CostTable(OfMethods):
    """Throughput, memory, the one-time cost of the factors."""

    domain: str = Field(description="Domain whose rows are trained on.")
    warmup: int = Field(default=20, ge=0, description="Steps before the measured ones.")
    steps: Positive = Field(default=200, description="Measured steps.")
    repeats: Positive = Field(default=1, description="Times that each method is timed, in turn with the others.")

    def runs(self, study: Study) -> list[Run]:
        """Time every method as often as is asked for, in turn, and compute the factors of those with some."""
        rows = list(map(study.row, self.methods))
        timed = [(self._speed(study, row, n), {"method": row.title}) for n in range(self.repeats) for row in rows]
        factors = [(study.factors(row), {"method": row.title}) for row in rows]
        return [*timed, *((job, label) for job, label in factors if job is not None)]

    def tables(self, study: Study, done: Done) -> Findings:
        """Return throughput and memory, with ratios to the first method that is named, and the cost of the factors."""
        numbers = joined(pd.DataFrame(list(self._measured(study, done))), columns=BOUNDS).dropna(subset="estimate")
        looks = pd.DataFrame.from_dict(SHOWN, orient="index", columns=["column", "scale", "digits"])
        shown = looks.join(numbers.set_index("metric"), how="inner")
        shown["column"] = [column.format(study.row(self.methods[0]).title) for column in shown.column]
        shown[BOUNDS] = shown[BOUNDS].astype(float).div(shown.scale, axis=0)
        machines = "; ".join(sorted(numbers.machine.unique()))
        text = (
            f"Measured on {machines}, each method alone in a process of its own, over {self.steps} steps after "
            f"{self.warmup} to warm up, {self.repeats} times in turn; intervals are Student's t over the times. "
            "Factors: computed once for a base model, with calibration; no time where the cache had them."
        )
        return Findings(numbers, {"table": ("Cost", table(shown, paper="cost"))}, text=text)

    def _speed(self, study: Study, row: Any, repeat: int) -> Job:
        """The job that times a method, the n-th time: its training at the study's rate, which changes no time."""
        trained = study.adapter(row, self.domain, study.seeds(self)[0], lr=study.recipe.train.lr)
        settings = {name: trained.settings[name] for name in ("recipe", "files")}
        settings |= {"warmup": self.warmup, "steps": self.steps} | ({"repeat": repeat} if repeat else {})
        needs = {name: job for name, job in trained.needs.items() if name == "factors"}
        suffix = f", time {repeat + 1}" if repeat else ""
        return study.job("speed", f"time {row.title}{suffix}", settings, **needs)

    def _measured(self, study: Study, done: Done) -> Iterator[dict[str, Any]]:
        """Speeds in tokens per second, peak memory in bytes, both beside the first method's, and the factors."""
        reference, speeds = study.row(self.methods[0]).title, {}
        for title in dict.fromkeys(labels["method"] for *_, labels in done):
            records = [(job, record) for job, record, labels in done if labels["method"] == title]
            timed = [record for job, record in records if job.kind == "speed"]
            times = pd.DataFrame([record["timing"] for record in timed])
            machine = timed[0]["provenance"].get("machine", {})
            parts = [times.gpu[0], f"{machine.get('processor')}, {machine.get('cores')} cores"]
            speed, memory = speeds[title] = times.tokens_per_second, times.peak_memory_bytes.astype(float).max()
            label = {"method": title, "machine": ", ".join(filter(None, parts))}
            yield {**label, "metric": "throughput", "estimate": speed.mean(), "unit": "tokens/s"}
            yield {**label, "metric": "peak memory", "estimate": memory, "unit": "bytes"}
            if reference in speeds:
                # The methods were timed in turn: the n-th times are compared with each other.
                ratio = student(pd.concat({0: speed / speeds[reference][0]}, names=["of", "seed"])).iloc[0]
                over = {**label, "over": reference, "unit": "ratio"}
                yield {**over, "metric": "throughput ratio", **ratio}
                yield {**over, "metric": "peak memory ratio", "estimate": memory / speeds[reference][1]}
            for record in (record for job, record in records if job.kind == "factorize"):
                seconds, size = record["timing"]["factorize_seconds"], record["result"]["bytes"]
                if not record["timing"]["reused"]:  # from the cache they cost nothing
                    yield {**label, "metric": "factors", "estimate": seconds, "unit": "seconds"}
                yield {**label, "metric": "cache", "estimate": size, "unit": "bytes"}
