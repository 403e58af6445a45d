"""`hiplora eval`: the base and adapters on the same items of a suite, with intervals for every score and difference."""

import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hiplora import __version__
from hiplora.evaluation.mounting import BASE, check_adapters, load_model, mounted, name_adapters
from hiplora.evaluation.suite import Suite, read_suite
from hiplora.files import check_output_file, read_state, write_atomic, write_state
from hiplora.metrics import DEFAULT_TAUS, Interval, paired_bootstrap, sign_flip_p_value
from hiplora.metrics.bootstrap import percentile_interval, resampled_means
from hiplora.metrics.scores import fails
from hiplora.models import load_tokenizer
from hiplora.provenance import folder_identity, json_sha256, provenance

if TYPE_CHECKING:
    from hiplora.evaluation.engine import Engine, TaskScores

FORMS = ("score", "likelihood")
MARGIN = 1.0  # pp that a score may fall and still count as kept


@dataclass(frozen=True)
class EvalSettings:
    """What models are scored on, and how.

    `data` is the folder with the tasks' files (default: $HIPLORA_DATA, else the hub), `limit` the number of items of
    each task (None: all), drawn by `seed`. `allow_code` lets tasks run what the model writes, in the sandbox;
    `allow_suite_code` lets the suite's own folders of tasks run theirs, which nothing confines.
    """

    suite: str
    data: str | Path | None = None
    limit: int | None = None
    seed: int = 0
    batch_size: int = 8
    allow_code: bool = False
    allow_suite_code: bool = False
    device: str = "auto"

    @property
    def folder(self) -> Path | None:
        """Folder with the data, if there is one."""
        folder = self.data or os.environ.get("HIPLORA_DATA")
        return Path(folder) if folder else None

    def engine(self, suite: Suite, tokenizer: Any) -> "Engine":
        """Load the suite's tasks, for a model with this tokenizer."""
        from hiplora.evaluation.engine import Engine

        return Engine(suite, self, tokenizer)


def evaluate(
    model: str,
    adapters: Sequence[str | os.PathLike],
    settings: EvalSettings,
    out: str | os.PathLike,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Score a base model and adapters (each a folder, or NAME=FOLDER) on the same items; write and return the results.

    Finished models are kept beside `out` until all are done: the same call continues where it stopped. ConfigError or
    DataError if settings, suite, data or `out` cannot be used; AdapterError if an adapter has no effect, does not fit,
    or leaves the base changed. Nothing is scored or written then.
    """
    folders = name_adapters(adapters)
    inputs: dict[str, Any] = {
        "the base model": model,
        **{f"adapter {name}": folder for name, folder in folders.items()},
    }
    path = check_output_file(out, overwrite, inputs=inputs)
    scoring = Scoring("evaluation", model, folders, read_suite(settings.suite, settings.folder), settings, path)
    for name in (BASE, *folders):
        scoring.add(name, mounted(scoring.network, folders.get(name)))
    results = scoring.results((BASE, *folders))
    write_atomic(path, json.dumps(results, indent=1))
    scoring.store.remove()
    return results


class Scoring:
    """Scores a base model, and adapters on it, on the same items; finished scores are kept beside `out`.

    `merge` is what else the scores depend on. Raises AdapterError as `evaluate` does.
    """

    def __init__(
        self, kind: str, model: str, adapters: Mapping[str, Path], suite: Suite, settings: EvalSettings, out: Path,
        **merge: Any,
    ):  # fmt: skip
        self.engine, self._batch = settings.engine(suite, load_tokenizer(model)), settings.batch_size
        self.network, self.tokenizer = load_model(model, settings.device)
        self.check({name: mounted(self.network, folder) for name, folder in adapters.items()})
        plan = {
            "kind": kind,
            "hiplora": __version__,
            "model": [model, folder_identity(model)],
            "adapters": {name: folder_identity(folder) for name, folder in adapters.items()},
            **merge,
            "tasks": self.engine.describe(),
            "seed": settings.seed,
        }
        self.store = Partial(out, plan)
        self._header = {
            "schema": 1,
            "kind": kind,
            "model": model,
            "suite": suite.name,
            "limit": settings.limit,
            "seed": settings.seed,
            "adapters": {name: str(folder) for name, folder in adapters.items()},
            "provenance": provenance(plan_sha256=json_sha256(plan)),
        }

    def check(self, puts: Mapping[str, AbstractContextManager[Any]]) -> None:
        """Check that each adapter acts on the base, and comes off again."""
        check_adapters(self.network, self.tokenizer, self.engine.prompts(), puts)

    def add(self, name: str, put: AbstractContextManager[Any], tasks: Sequence[str] | None = None) -> None:
        """Score the base with what `put` puts on it, on all tasks or some, unless its scores are stored."""
        if name not in self.store.runs:
            with put as scored:
                scores = self.engine.score(scored, self.tokenizer, self._batch, tasks, progress=True)
            self.store.add(name, scores)

    def results(self, names: Iterable[str]) -> dict[str, Any]:
        """Return the results file of these models; an unfinished call may have scored others."""
        return self._header | collect(self.engine.describe(), {name: self.store.runs[name] for name in names})


class Partial:
    """The scores so far, in a file beside the final one, also of an unfinished call with the same plan."""

    def __init__(self, out: Path, plan: Mapping[str, Any]):
        self._path, self._plan = out.with_name(f".{out.name}.partial"), json_sha256(dict(plan))
        state = read_state(self._path) or {}
        self.runs: dict[str, dict[str, Any]] = state["runs"] if state.get("plan") == self._plan else {}

    def add(self, name: str, scores: "Mapping[str, TaskScores]") -> None:
        """Keep a model's scores."""
        self.runs[name] = {task: asdict(score) for task, score in scores.items()}
        write_state(self._path, {"plan": self._plan, "runs": self.runs})

    def remove(self) -> None:
        """Remove the file once the results are written."""
        self._path.unlink(missing_ok=True)


def collect(tasks: Mapping[str, Mapping[str, Any]], runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the sections `tasks`, `runs` and `differences` of a results file, of runs with `TaskScores` as JSON.

    `runs[name][task]` has, for `score` and `likelihood`, the mean with its interval and the value of every item;
    `differences[task][form]` compares every two models on the items that both saw: `verdict` is "kept" if the score
    fell by less than a point, "lost" if it fell, "cannot tell" else. Intervals are 95 %, from the paired bootstrap over
    items (where all items agree, see `_widened`); p is the sign-flip test's.
    """
    sections: dict[str, Any] = {
        "tasks": {},
        "runs": {name: {} for name in runs},
        "differences": {task: {} for task in tasks},
    }
    for task, description in tasks.items():
        scored = {name: run[task] for name, run in runs.items() if task in run}
        for name, run in scored.items():
            sections["tasks"][task] = {**description, "metrics": {"score": run["metric"], "likelihood": run["form"]}}
            sections["runs"][name][task] = {"others": run["others"]} if run["others"] else {}
        for form in FORMS:
            values = {name: run[form] for name, run in scored.items()}
            if None in values.values():
                continue
            result = paired_bootstrap({name: [items] for name, items in values.items()})
            for name, items in values.items():
                sections["runs"][name][task][form] = {**_widened(result.mean[name], items, 0.0), "items": items}
            rows = sections["differences"][task][form] = []
            for against, of in itertools.combinations(values, 2):
                change = _widened(result.difference[of, against], np.subtract(values[of], values[against]), -100.0)
                verdict = "kept" if change["low"] > -MARGIN else "lost" if change["high"] < 0 else "cannot tell"
                p = sign_flip_p_value([values[of]], [values[against]])
                rows.append({"of": of, "against": against, **change, "verdict": verdict, "p": p})
    return sections


def _widened(interval: Interval, items: Sequence[float], least: float) -> dict[str, float]:
    """Return an interval; one of no width is widened by what unseen items between `least` and 100 may add.

    Where all n items agree, every bootstrap sample is the same. With 97.5 % confidence, at most 1 − 0.025^(1/n) of all
    items differ from them, and may lie at either end.
    """
    low, high = interval.low, interval.high
    if low == high:
        unseen = 1 - 0.025 ** (1 / len(items))
        low, high = low - (low - least) * unseen, high + (100.0 - high) * unseen
    return {"estimate": interval.estimate, "low": low, "high": high}


def judge(
    merges: Sequence[tuple[Mapping[str, Sequence[float]], Mapping[str, Sequence[float]]]], seed: int = 0
) -> dict[str, Any]:
    """Return MergeFail over the τ table and the mean absolute drop of some merges, with 95 % intervals.

    A merge is a pair: each task's scores before it (its adapter alone) and after it, item by item. Each of 10,000
    replicates draws every task's items with replacement, the same for all scores on them. A single merge either fails
    or does not: its estimate is 0 or 1, and `share` is the share of replicates in which it fails.
    """
    draws: list[tuple[dict[str, Any], dict[str, Any]]] = [({}, {}) for _ in merges]
    for number, task in enumerate(dict.fromkeys(task for before, _ in merges for task in before)):
        indices = [index for index, (before, _) in enumerate(merges) if task in before]
        sides = [side[task] for index in indices for side in merges[index]]
        means = resampled_means(np.transpose(sides), seed=[seed, number]).T
        for index, before, after in zip(indices, means[::2], means[1::2], strict=True):
            draws[index][0][task], draws[index][1][task] = before, after
    failing = {}
    for tau in DEFAULT_TAUS:
        failed = np.mean([fails(after, before, tau) for before, after in draws], axis=0)
        failing[f"{tau:g}"] = asdict(percentile_interval(failed)) | {"share": float(failed[1:].mean())}
    drops = [np.abs(before[task] - after[task]) for before, after in draws for task in before]
    return {"merge_fail": failing, "mean_drop": asdict(percentile_interval(np.mean(drops, axis=0)))}
