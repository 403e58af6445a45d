"""`hiplora eval`: the base and adapters on the same items of a suite, with intervals for every score and difference."""

import importlib.util
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hiplora import __version__
from hiplora.errors import ConfigError
from hiplora.evaluation.naming import BASE, name_adapters
from hiplora.evaluation.suite import Suite, read_suite
from hiplora.files import check_output_file, write_atomic
from hiplora.metrics import paired_bootstrap
from hiplora.provenance import folder_identity, json_sha256, provenance

if TYPE_CHECKING:
    from hiplora.evaluation.engine import Engine, TaskScores

REPLICATES = 10_000
Values = Mapping[str, Sequence[float]]
# Called with what is done and how much it is; returns what is called with each part that is finished.
Progress = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True)
class EvalSettings:
    """What models are scored on, and how.

    `data` is the folder with the tasks' files (else the hub), `limit` the number of items of each task, drawn by
    `seed`; `allow_code` lets tasks run what the model writes.
    """

    suite: str
    data: str | Path | None = None
    limit: int | None = None
    seed: int = 0
    batch_size: int = 8
    allow_code: bool = False

    def __post_init__(self) -> None:
        """Refuse values that make no sense, naming the option."""
        for name, value in (("--limit", self.limit), ("--batch-size", self.batch_size)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; expected at least 1")
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}; expected 0 or more")

    @property
    def folder(self) -> Path | None:
        """Folder with the data, if there is one: `data`, else that of the environment variable HIPLORA_DATA."""
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
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score a base model and adapters on the same items, write the results and return them.

    Before anything is scored, every adapter is shown to change the logits, and the base to come back bit for bit
    when it is off. What was scored is kept beside `out` until all is: the same call goes on where it stopped.

    Args:
        model: base model: `smollm2-135m`, a folder, or a name on the hub.
        adapters: folders, each alone or as NAME=FOLDER; the folder's name is the name otherwise.
        settings: suite and items.
        out: JSON file to write.
        overwrite: replace it if it exists.
        progress: for a progress bar.

    Raises:
        ConfigError, DataError: settings, suite, data or `out` cannot be used.
        AdapterError: an adapter does not act, does not fit, or leaves the base changed. Nothing is written then.
    """
    path = check_output_file(out, overwrite)
    named = name_adapters(adapters)
    _check_folders(named)
    suite = settings.read_suite()
    engine = settings.engine(suite)
    network, tokenizer = load_model(model)
    from hiplora.evaluation.mounting import mounted

    check_adapters(network, tokenizer, engine, named)
    plan = _plan(model, named, settings, engine)
    store = Partial(path, plan)
    for name in (BASE, *named):
        if name in store.runs:
            continue
        tick = (progress or _silent)(f"scoring {name}", engine.requests())
        if name == BASE:
            scores = engine.score(network, tokenizer, settings.batch_size, on_progress=tick)
        else:
            with mounted(network, named[name]) as adapted:
                scores = engine.score(adapted, tokenizer, settings.batch_size, on_progress=tick)
        store.add(name, scores)
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
    """The scores so far, kept beside the file that is to have them all; those of another plan are left out."""

    def __init__(self, out: Path | None, plan: Mapping[str, Any]):
        """Read what an unfinished call with the same plan left; without a file nothing is kept."""
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
        kept = {"plan": self._plan, "runs": self.runs, "names": self.names}
        if self._path:
            write_atomic(self._path, json.dumps(kept))

    def remove(self) -> None:
        """Remove the file: the results are written."""
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
    paired bootstrap over items; p is of the sign-flip test.
    """
    found: dict[str, Any] = {"tasks": {}, "runs": {name: {} for name in runs}, "differences": {}}
    for task, described in tasks.items():
        found["tasks"][task] = {**described, "metrics": names[task]}
        found["differences"][task] = {}
        for form in ("score", "likelihood"):
            values = {name: run[task][form] for name, run in runs.items() if task in run}
            if any(value is None for value in values.values()):
                continue
            means, differences = intervals(values)
            found["differences"][task][form] = differences
            for name, mean in means.items():
                found["runs"][name].setdefault(task, {})[form] = {**mean, "items": values[name]}
        for name, run in runs.items():
            if task in run and run[task]["others"]:
                found["runs"][name][task]["others"] = run[task]["others"]
    return found


def intervals(values: Values) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:
    """Return each model's mean over the items, and every difference of two, with 95 % intervals."""
    result = paired_bootstrap({name: [list(items)] for name, items in values.items()}, replicates=REPLICATES)
    means = {name: _interval(result.mean[name]) for name in values}
    differences = [
        {
            "of": one,
            "against": other,
            **_interval(result.difference[one, other]),
            "p": result.p_value[one, other],
        }
        for other, one in itertools.combinations(values, 2)
    ]
    return means, differences


def _interval(found: Any) -> dict[str, float]:
    return {"estimate": found.estimate, "low": found.low, "high": found.high}


def load_model(model: str) -> tuple[Any, Any]:
    """Load a model to be scored: on the GPU in its own precision where there is one, else in fp32.

    Its weights take no gradients, as PEFT leaves those of a base that it took an adapter off: with and without them
    products round differently, and a base must score the same before an adapter as after one.
    """
    import torch

    from hiplora.models import load

    gpu = torch.cuda.is_available()
    network, tokenizer = load(model, "auto" if gpu else None)
    return (network.to("cuda") if gpu else network).requires_grad_(False), tokenizer


def check_adapters(network: Any, tokenizer: Any, engine: "Engine", adapters: Mapping[str, Path]) -> None:
    """Show, on a few prompts of the suite, that each adapter acts and that the base comes back bit for bit.

    Raises:
        AdapterError: one does not.
    """
    from hiplora.evaluation.mounting import check_acts, mounted

    prompts = engine.prompts()
    base = probe(network, tokenizer, prompts)
    for name, folder in adapters.items():
        with mounted(network, folder) as adapted:
            on = probe(adapted, tokenizer, prompts)
            with adapted.disable_adapter():
                check_acts(base, on, probe(adapted, tokenizer, prompts), name)
        check_acts(base, on, probe(network, tokenizer, prompts), f"{name}, taken off again")


def probe(network: Any, tokenizer: Any, prompts: Sequence[str]) -> Any:
    """Return the logits after the first tokens of some prompts."""
    import torch

    found = []
    for prompt in prompts:
        ids = tokenizer(prompt or tokenizer.eos_token or " ", return_tensors="pt")["input_ids"][:, :64]
        with torch.no_grad():
            found.append(network(input_ids=ids.to(network.device), use_cache=False).logits[0].float().cpu())
    return torch.cat(found)


def _check_folders(adapters: Mapping[str, Path]) -> None:
    for folder in adapters.values():
        if not (folder / "adapter_config.json").is_file():
            what = "holds no adapter_config.json" if folder.is_dir() else "no such folder"
            raise ConfigError(f"--adapter {folder}: {what}; expected an adapter folder, or NAME=FOLDER")


def _plan(
    model: str, adapters: Mapping[str, Path], settings: EvalSettings, engine: "Engine"
) -> dict[str, Any]:
    """What makes two calls the same evaluation."""
    return {
        "kind": "evaluation",
        "hiplora": __version__,
        "model": [model, folder_identity(model)],
        "adapters": {name: folder_identity(folder) for name, folder in adapters.items()},
        "tasks": engine.describe(),
        "seed": settings.seed,
    }


def _silent(what: str, total: int) -> Callable[[int], None]:
    return lambda done: None
