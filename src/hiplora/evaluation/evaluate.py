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
        named = self.data or os.environ.get("HIPLORA_DATA")
        return Path(named) if named else None

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
    named = name_adapters(adapters)
    inputs: dict[str, Any] = {"the base model": model, **{f"adapter {name}": folder for name, folder in named.items()}}
    path = check_output_file(out, overwrite, inputs=inputs)
    scoring = Scoring("evaluation", model, named, read_suite(settings.suite, settings.folder), settings, path)
    for name in (BASE, *named):
        scoring.add(name, mounted(scoring.network, named.get(name)))
    results = scoring.results((BASE, *named))
    write_atomic(path, json.dumps(results, indent=1))
    scoring.store.remove()
    return results


class Scoring:
    """A base model with what is put on it, model by model scored on the same items; done scores are kept beside `out`.

    `merge` is what else the scores depend on. AdapterError as of `evaluate`.
    """

    def __init__(
        self, kind: str, model: str, named: Mapping[str, Path], suite: Suite, settings: EvalSettings, out: Path,
        **merge: Any,
    ):  # fmt: skip
        self.engine, self._batch = settings.engine(suite, load_tokenizer(model)), settings.batch_size
        self.network, self.tokenizer = load_model(model, settings.device)
        self.check({name: mounted(self.network, folder) for name, folder in named.items()})
        plan = {
            "kind": kind,
            "hiplora": __version__,
            "model": [model, folder_identity(model)],
            "adapters": {name: folder_identity(folder) for name, folder in named.items()},
            **merge,
            "tasks": self.engine.describe(),
            "seed": settings.seed,
        }
        self.store = Partial(out, plan)
        self._told = {
            "schema": 1,
            "kind": kind,
            "model": model,
            "suite": suite.name,
            "limit": settings.limit,
            "seed": settings.seed,
            "adapters": {name: str(folder) for name, folder in named.items()},
            "provenance": provenance(plan_sha256=json_sha256(plan)),
        }

    def check(self, puts: Mapping[str, AbstractContextManager[Any]]) -> None:
        """Check that what is put on the base acts, and comes off again."""
        check_adapters(self.network, self.tokenizer, self.engine.prompts(), puts)

    def add(self, name: str, put: AbstractContextManager[Any], tasks: Sequence[str] | None = None) -> None:
        """Score what `put` puts on the base, on all tasks or some, unless its scores are known."""
        if name not in self.store.runs:
            with put as scored:
                scores = self.engine.score(scored, self.tokenizer, self._batch, tasks, progress=True)
            self.store.add(name, scores)

    def results(self, names: Iterable[str]) -> dict[str, Any]:
        """Return the results file of these models; an unfinished call may have scored others."""
        return self._told | collect(self.engine.describe(), {name: self.store.runs[name] for name in names})


class Partial:
    """The scores so far, in a file beside the final one, also of an unfinished call with the same plan."""

    def __init__(self, out: Path, plan: Mapping[str, Any]):
        self._path, self._plan = out.with_name(f".{out.name}.partial"), json_sha256(dict(plan))
        found = read_state(self._path) or {}
        self.runs: dict[str, dict[str, Any]] = found["runs"] if found.get("plan") == self._plan else {}

    def add(self, name: str, scores: "Mapping[str, TaskScores]") -> None:
        """Keep a model's scores."""
        self.runs[name] = {task: asdict(found) for task, found in scores.items()}
        write_state(self._path, {"plan": self._plan, "runs": self.runs})

    def remove(self) -> None:
        """Remove the file once the results are written."""
        self._path.unlink(missing_ok=True)


def collect(tasks: Mapping[str, Mapping[str, Any]], runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the sections `tasks`, `runs` and `differences` of a results file, of runs with `TaskScores` as JSON.

    `runs[name][task]` has, for `score` and `likelihood`, the mean with its interval and the value of every item;
    `differences[task][form]` compares every two models on the items that both saw: `verdict` is "kept" if the score
    fell by less than a point, "lost" if it fell, "cannot tell" else. Intervals are 95 %, from the paired bootstrap over
    items (where all items agree, see `_wide`); p is the sign-flip test's.
    """
    found: dict[str, Any] = {
        "tasks": {},
        "runs": {name: {} for name in runs},
        "differences": {task: {} for task in tasks},
    }
    for task, described in tasks.items():
        scored = {name: run[task] for name, run in runs.items() if task in run}
        for name, run in scored.items():
            found["tasks"][task] = {**described, "metrics": {"score": run["metric"], "likelihood": run["form"]}}
            found["runs"][name][task] = {"others": run["others"]} if run["others"] else {}
        for form in FORMS:
            values = {name: run[form] for name, run in scored.items()}
            if None in values.values():
                continue
            result = paired_bootstrap({name: [items] for name, items in values.items()})
            for name, items in values.items():
                found["runs"][name][task][form] = {**_wide(result.mean[name], items, 0.0), "items": items}
            rows = found["differences"][task][form] = []
            for other, one in itertools.combinations(values, 2):
                apart = _wide(result.difference[one, other], np.subtract(values[one], values[other]), -100.0)
                verdict = "kept" if apart["low"] > -MARGIN else "lost" if apart["high"] < 0 else "cannot tell"
                p = sign_flip_p_value([values[one]], [values[other]])
                rows.append({"of": one, "against": other, **apart, "verdict": verdict, "p": p})
    return found


def _wide(found: Interval, items: Sequence[float], least: float) -> dict[str, float]:
    """Return an interval; one of no width is widened to what items between `least` and 100 may still do.

    Where all n items agree the bootstrap has nothing to draw from. With 97.5 % confidence, at most 1 − 0.025^(1/n) of
    all items differ from them: they may lie at either end.
    """
    low, high = found.low, found.high
    if low == high:
        unseen = 1 - 0.025 ** (1 / len(items))
        low, high = low - (low - least) * unseen, high + (100.0 - high) * unseen
    return {"estimate": found.estimate, "low": low, "high": high}


def judge(
    merges: Sequence[tuple[Mapping[str, Sequence[float]], Mapping[str, Sequence[float]]]], seed: int = 0
) -> dict[str, Any]:
    """Return MergeFail over the τ table and the mean absolute drop of some merges, with 95 % intervals.

    A merge is a pair: each task's scores before it (its adapter alone) and after it, item by item. Each of 10,000
    replicates draws every task's items with replacement, the same for all scores on them. A single merge either fails
    or does not: its estimate is 0 or 1, and `share` is the share of replicates in which it fails.
    """
    draws: list[tuple[dict[str, Any], dict[str, Any]]] = [({}, {}) for _ in merges]
    for place, task in enumerate(dict.fromkeys(task for before, _ in merges for task in before)):
        having = [index for index, (before, _) in enumerate(merges) if task in before]
        sides = [side[task] for index in having for side in merges[index]]
        means = resampled_means(np.transpose(sides), seed=[seed, place]).T
        for index, before, after in zip(having, means[::2], means[1::2], strict=True):
            draws[index][0][task], draws[index][1][task] = before, after
    failing = {}
    for tau in DEFAULT_TAUS:
        failed = np.mean([fails(after, before, tau) for before, after in draws], axis=0)
        failing[f"{tau:g}"] = asdict(percentile_interval(failed)) | {"share": float(failed[1:].mean())}
    drops = [np.abs(before[task] - after[task]) for before, after in draws for task in before]
    return {"merge_fail": failing, "mean_drop": asdict(percentile_interval(np.mean(drops, axis=0)))}
