"""`hiplora eval`: the base and adapters on the same items of a suite, with intervals for every score and difference."""

import importlib.util
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hiplora import __version__
from hiplora.errors import ConfigError
from hiplora.evaluation.mounting import BASE, check_adapters, load_model, mounted, name_adapters
from hiplora.evaluation.suite import Suite, read_suite
from hiplora.files import check_output_file, write_atomic
from hiplora.metrics import paired_bootstrap, sign_flip_p_value
from hiplora.provenance import folder_identity, json_sha256, provenance

if TYPE_CHECKING:
    import pandas as pd

    from hiplora.evaluation.engine import Engine, TaskScores

FORMS = ("score", "likelihood")
COLUMNS = ("run", "method", "domain", "seed", "task", "item", "metric", "value")


@dataclass(frozen=True)
class EvalSettings:
    """What models are scored on, and how.

    `data` is the folder with the tasks' files (default: $HIPLORA_DATA, else the hub), `limit` the number of items of
    each task, drawn by `seed`; `allow_code` lets tasks run code that the model writes.
    """

    suite: str
    data: str | Path | None = None
    limit: int | None = None
    seed: int = 0
    batch_size: int = 8
    allow_code: bool = False

    def __post_init__(self) -> None:
        """Check the ranges of the options."""
        for name, value in (("--limit", self.limit), ("--batch-size", self.batch_size)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; expected at least 1")
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}; expected 0 or more")

    @property
    def folder(self) -> Path | None:
        """Folder with the data, if there is one."""
        named = self.data or os.environ.get("HIPLORA_DATA")
        return Path(named) if named else None

    def read_suite(self) -> Suite:
        """Return the suite."""
        return read_suite(self.suite, self.folder)

    def engine(self, suite: Suite) -> "Engine":
        """Load the suite's tasks.

        Raises:
            ConfigError, DataError: as `hiplora.evaluation.engine.Engine`, or lm-eval is not installed.
        """
        if importlib.util.find_spec("lm_eval") is None:
            raise ConfigError("evaluation needs lm-eval, which is not installed: pip install 'hiplora[eval]'")
        from hiplora.evaluation.engine import Engine

        return Engine(suite, data=self.folder, limit=self.limit, seed=self.seed, allow_code=self.allow_code)


def evaluate(
    model: str,
    adapters: Sequence[str | os.PathLike],
    settings: EvalSettings,
    out: str | os.PathLike,
    *,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Score a base model and adapters on the same items, write the results and return them.

    The base is loaded once and adapters are mounted on it in turn. Before anything is scored, every adapter is checked
    to change the logits, and the base to come back bit for bit. Finished models are kept beside `out` until all are
    done: the same call continues where it stopped.

    Args:
        model: base model: `smollm2-135m`, a folder, or a name on the hub.
        adapters: folders, each alone or as NAME=FOLDER.
        settings: suite and items.
        out: JSON file to write.
        overwrite: replace it if it exists.
        progress: show progress bars on a terminal.

    Raises:
        ConfigError, DataError: settings, suite, data or `out` cannot be used.
        AdapterError: an adapter has no effect, does not fit, or leaves the base changed. Nothing is written then.
    """
    path = check_output_file(out, overwrite)
    named = name_adapters(adapters)
    suite = settings.read_suite()
    engine = settings.engine(suite)
    network, tokenizer = load_model(model)
    check_adapters(network, tokenizer, engine.prompts(), named)
    plan = {
        "kind": "evaluation",
        "hiplora": __version__,
        "model": [model, folder_identity(model)],
        "adapters": {name: folder_identity(folder) for name, folder in named.items()},
        "tasks": engine.describe(),
        "seed": settings.seed,
    }
    store = Partial(path, plan)
    if BASE not in store.runs:
        store.add(BASE, engine.score(network, tokenizer, settings.batch_size, progress=progress))
    for name, folder in named.items():
        if name not in store.runs:
            with mounted(network, folder) as adapted:
                store.add(name, engine.score(adapted, tokenizer, settings.batch_size, progress=progress))
    results = {
        "schema": 1,
        "kind": "evaluation",
        "model": model,
        "suite": suite.name,
        "limit": settings.limit,
        "seed": settings.seed,
        "adapters": {name: str(folder) for name, folder in named.items()},
        **collect(engine.describe(), store.runs, store.names),
        "provenance": provenance(plan_sha256=json_sha256(plan)),
    }
    write_atomic(path, json.dumps(results, indent=1))
    store.remove()
    return results


class Partial:
    """The scores so far, in a file beside the final one; those of another plan are ignored."""

    def __init__(self, out: Path | None, plan: Mapping[str, Any]):
        """Read what an unfinished call with the same plan left; without a path nothing is kept."""
        self._path = out.with_name(f".{out.name}.partial") if out else None
        self._plan = json_sha256(dict(plan))
        self.runs: dict[str, dict[str, Any]] = {}
        self.names: dict[str, dict[str, Any]] = {}
        if self._path and self._path.is_file():
            found = json.loads(self._path.read_text())
            if found.get("plan") == self._plan:
                self.runs, self.names = found["runs"], found["names"]

    def add(self, name: str, scores: "Mapping[str, TaskScores]") -> None:
        """Keep a model's scores."""
        self.runs[name] = {task: found.to_json() for task, found in scores.items()}
        for task, found in scores.items():
            self.names.setdefault(task, {"score": found.name, "likelihood": found.form})
        if self._path:
            kept = {"plan": self._plan, "runs": self.runs, "names": self.names}
            write_atomic(self._path, json.dumps(kept))

    def remove(self) -> None:
        """Remove the file once the results are written."""
        if self._path:
            self._path.unlink(missing_ok=True)


def collect(
    tasks: Mapping[str, Mapping[str, Any]],
    runs: Mapping[str, Mapping[str, Any]],
    names: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the sections `tasks`, `runs` and `differences` of a results file.

    `runs[name][task]` has, for `score` and `likelihood`, the mean with its interval and the value of every item;
    `differences[task][form]` compares every two models on the items that both saw. Intervals are 95 %, from the
    paired bootstrap over items; p is the sign-flip test's.
    """
    found: dict[str, Any] = {"tasks": {}, "runs": {name: {} for name in runs}, "differences": {}}
    for task, described in tasks.items():
        found["tasks"][task] = {**described, "metrics": names[task]}
        found["differences"][task] = {}
        scored = {name: run[task] for name, run in runs.items() if task in run}
        for form in FORMS:
            values = {name: run[form] for name, run in scored.items()}
            if any(value is None for value in values.values()):
                continue
            means, found["differences"][task][form] = intervals(values)
            for name, mean in means.items():
                found["runs"][name].setdefault(task, {})[form] = {**mean, "items": values[name]}
        for name, run in scored.items():
            if run["others"]:
                found["runs"][name][task]["others"] = run["others"]
    return found


def intervals(
    values: Mapping[str, Sequence[float]],
) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:
    """Return each model's mean over the items, and every difference of two, with 95 % intervals."""
    result = paired_bootstrap({name: [list(items)] for name, items in values.items()})
    means = {name: asdict(result.mean[name]) for name in values}
    differences = [
        {
            "of": one,
            "against": other,
            **asdict(result.difference[one, other]),
            "p": sign_flip_p_value([values[one]], [values[other]]),
        }
        for other, one in itertools.combinations(values, 2)
    ]
    return means, differences


def records(
    results: Mapping[str, Any],
    *,
    method: str | None = None,
    domain: str | None = None,
    seed: int | None = None,
) -> "pd.DataFrame":
    """Return a results file as one tidy table: run, method, domain, seed, task, item, metric, value.

    A row is one item's value in one form, `metric` being `score` or `likelihood`, in per cent; `item` is the item's
    place in the data. `method` is the run's name unless given; `domain` and `seed`, of the adapters' training, are
    as given.
    """
    import pandas as pd

    rows = [
        (run, method or run, domain, seed, task, item, form, value)
        for run, scored in results["runs"].items()
        for task, forms in scored.items()
        for form in FORMS
        if form in forms
        for item, value in zip(results["tasks"][task]["items"], forms[form]["items"], strict=True)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))
