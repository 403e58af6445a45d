"""lm-eval as the engine: a suite's tasks and items, loaded once, and the scores of a model on every item."""

import contextlib
import functools
import hashlib
import json
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from hiplora.errors import ConfigError, DataError, HipLoraError, first_line
from hiplora.evaluation.lm import AnswerLM
from hiplora.evaluation.suite import TASKS, Suite, TaskRequest
from hiplora.evaluation.tasks.rows import DATA_VARIABLE
from hiplora.metrics import answer_likelihood, gold_probability

GOLD = "mean probability of the gold choice"
ANSWER = "likelihood of a token of the answer"
TEXT = "likelihood of a token of the text"


@dataclass(frozen=True)
class TaskScores:
    """What a model scored on a task, item by item, in per cent; higher is better.

    `score` is by the metric `name` (None where lm-eval has none that goes by items: a perplexity), `likelihood` is
    its likelihood form, named by `form`. `others` are the values of lm-eval's other metrics, as lm-eval gives them.
    """

    name: str
    score: list[float] | None
    form: str
    likelihood: list[float]
    others: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready record."""
        return {"score": self.score, "likelihood": self.likelihood, "others": self.others}

    def primary(self) -> list[float]:
        """The score where there is one, else the likelihood."""
        return self.likelihood if self.score is None else self.score


class Engine:
    """A suite's tasks with their items chosen: every model that it scores sees the same items in the same order."""

    def __init__(
        self,
        suite: Suite,
        *,
        data: Path | None = None,
        limit: int | None = None,
        seed: int = 0,
        allow_code: bool = False,
    ):
        """Load the tasks' rows and choose `limit` of each at random by `seed` (all if None).

        Raises:
            ConfigError: lm-eval knows no such task, or a task runs code and that was not allowed.
            DataError: a task's rows cannot be had.
        """
        self.suite, self.seed, self._allow_code = suite, seed, allow_code
        self._tasks = _load_tasks(suite, data)
        for name, task in self._tasks.items():
            if getattr(task, "UNSAFE_CODE", False):
                from hiplora.evaluation.sandbox import require_permission

                require_permission(allow_code)
            if task.OUTPUT_TYPE not in (
                "multiple_choice",
                "loglikelihood",
                "loglikelihood_rolling",
                "generate_until",
            ):
                raise ConfigError(
                    f"--suite: task {name} is of lm-eval's kind {task.OUTPUT_TYPE}, which is not scored"
                )
        self._chosen = {
            name: _choose(len(task.eval_docs), self._request(name).limit or limit, f"{seed}:{name}")
            for name, task in self._tasks.items()
        }

        self._counts: dict[str, int] = {}

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, as in the suite."""
        return list(self._tasks)

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return, a task, its title, its items' places in the data, and a hash of all that they say."""
        found = {}
        for name, task in self._tasks.items():
            rows = [task.eval_docs[index] for index in self._chosen[name]]
            text = json.dumps(rows, sort_keys=True, default=str)
            metadata = task.config.metadata if isinstance(task.config.metadata, dict) else {}
            found[name] = {
                "title": str(metadata.get("title", name)),
                "items": self._chosen[name],
                "of": len(task.eval_docs),
                "sha256": hashlib.sha256(text.encode()).hexdigest(),
            }
        return found

    def prompts(self) -> list[str]:
        """Return a few contexts of the first task: what an adapter is tried on before it is scored."""
        name = self.tasks[0]
        self._build([name])
        return [str(instance.args[0]) for instance in self._tasks[name].instances[:2]]

    def requests(self, tasks: Sequence[str] | None = None) -> int:
        """Return about how many requests scoring takes, for a progress bar."""
        for name in tasks or self.tasks:
            if name not in self._counts:
                self._build([name])
                self._counts[name] = _count(self._tasks[name])
        return sum(self._counts[name] for name in tasks or self.tasks)

    def score(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int = 8,
        tasks: Sequence[str] | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> dict[str, TaskScores]:
        """Score a model on every chosen item of the tasks (all of the suite if None).

        Sampled responses are drawn from the engine's seed, so that a model scores the same when it is scored again.

        Raises:
            HipLoraError: lm-eval failed; the message says at what.
        """
        names = list(tasks or self.tasks)
        lm = _quietly(lambda: AnswerLM(model, tokenizer, batch_size, on_progress))
        loaded = {self._request(name).lm_eval: self._tasks[name] for name in names}
        samples = {self._request(name).lm_eval: self._chosen[name] for name in names}
        torch.manual_seed(self.seed)
        random.seed(self.seed)
        try:
            found = _quietly(
                lambda: evaluate(
                    lm,
                    {"tasks": loaded, "groups": {}},
                    samples=samples,
                    bootstrap_iters=0,
                    confirm_run_unsafe_code=self._allow_code,
                )
            )
        except (AssertionError, KeyError, IndexError) as error:
            raise HipLoraError(f"lm-eval could not score {', '.join(names)}: {error!r}") from error
        return {name: self._scores(name, found, lm) for name in names}

    def responses(self, lm: Any, task: str) -> list[Any]:
        """Return what one of lm-eval's models answers to a task's requests, in their order."""
        self._build([task])
        instances = self._tasks[task].instances
        return _quietly(functools.partial(getattr(lm, instances[0].request_type), instances))

    def _request(self, name: str) -> TaskRequest:
        return next(request for request in self.suite.tasks if request.name == name)

    def _build(self, names: Sequence[str]) -> None:
        for name in names:
            build = self._tasks[name].build_all_requests
            _quietly(functools.partial(build, samples=self._chosen[name]))

    def _scores(self, name: str, found: Mapping[str, Any], lm: AnswerLM) -> TaskScores:
        task, key = self._tasks[name], self._request(name).lm_eval
        rows = sorted(found["samples"][key], key=lambda row: row["doc_id"])
        first = rows[0]["filter"]
        rows = [row for row in rows if row["filter"] == first]
        form, likelihood = _likelihoods(task, rows, lm)
        metric = _main_metric(task, rows[0])
        score = None if metric is None else [100.0 * float(row[metric]) for row in rows]
        results = found["results"][key]
        others = {
            metric_key.partition(",")[0]: float(value)
            for metric_key, value in results.items()
            if metric_key.endswith(f",{first}") and "_stderr" not in metric_key and _is_number(value)
        }
        if metric is not None:
            others.pop(metric, None)
        return TaskScores(metric or next(iter(others), form), score, form, likelihood, others)


def foreign_tasks() -> frozenset[str]:
    """Return the names of lm-eval's own tasks, groups not among them; it takes seconds."""
    return frozenset(_quietly(TaskManager).all_subtasks)


def _load_tasks(suite: Suite, data: Path | None) -> dict[str, Any]:
    own = all(request.lm_eval.startswith("hiplora_") for request in suite.tasks)
    paths = [str(TASKS), *map(str, suite.include)]
    with _data_folder(data):
        manager = _quietly(
            lambda: TaskManager(include_path=paths, include_defaults=not own and not suite.include)
        )
        if suite.include and any(request.lm_eval not in manager.all_tasks for request in suite.tasks):
            manager = _quietly(lambda: TaskManager(include_path=paths))
        found = {}
        for request in suite.tasks:
            if request.lm_eval not in manager.all_tasks:
                known = ", ".join(
                    name.removeprefix("hiplora_") for name in manager.all_tasks if name.startswith("hiplora_")
                )
                raise ConfigError(
                    f"--suite: task {request.name!r} is not known; expected one of {known}, one of lm-eval's "
                    "(lm_eval ls tasks), or one of the folders that a suite file includes"
                )
            loaded = _load_one(manager, request)
            if len(loaded) != 1:
                raise ConfigError(
                    f"--suite: {request.name} is a group of {len(loaded)} tasks; name the tasks themselves: "
                    f"{', '.join(sorted(loaded)[:6])}{', …' if len(loaded) > 6 else ''}"
                )
            found[request.name] = next(iter(loaded.values()))
    return found


def _load_one(manager: TaskManager, request: TaskRequest) -> dict[str, Any]:
    try:
        loaded = _quietly(lambda: manager.load([request.lm_eval]))
    except HipLoraError:
        raise
    except Exception as error:  # whatever the task's own loader raises
        raise DataError(f"--suite: task {request.name} cannot be loaded ({first_line(error)})") from error
    return loaded["tasks"]


@contextlib.contextmanager
def _data_folder(data: Path | None) -> Iterator[None]:
    """Let the tasks' loaders find the folder, as lm-eval's command line does, through the environment."""
    before = os.environ.get(DATA_VARIABLE)
    if data is not None:
        if not data.is_dir():
            raise DataError(f"--data {data}: no such folder")
        os.environ[DATA_VARIABLE] = str(data)
    try:
        yield
    finally:
        if data is not None:
            os.environ.pop(DATA_VARIABLE)
            if before is not None:
                os.environ[DATA_VARIABLE] = before


def _choose(count: int, limit: int | None, seed: str) -> list[int]:
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), limit))


def _count(task: Any) -> int:
    if task.OUTPUT_TYPE == "generate_until":
        return sum(instance.repeats + 1 for instance in task.instances)
    return len(task.instances)


def _likelihoods(task: Any, rows: Sequence[Mapping[str, Any]], lm: AnswerLM) -> tuple[str, list[float]]:
    """Return the likelihood form of a task's score: its name, and its value in per cent, item by item."""
    if task.OUTPUT_TYPE == "multiple_choice":
        return GOLD, [_gold(task, row) for row in rows]
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return TEXT, [
            answer_likelihood(row["resps"][0][0], lm.tokens[tuple(row["arguments"][0])]) for row in rows
        ]
    if task.OUTPUT_TYPE == "loglikelihood":
        pairs = [(tuple(row["arguments"][0]), row["resps"][0][0][0]) for row in rows]
    else:
        pairs = _gold_responses(task, rows, lm)
    return ANSWER, [answer_likelihood(total, lm.tokens[pair]) for pair, total in pairs]


def _gold(task: Any, row: Mapping[str, Any]) -> float:
    gold = task.doc_to_text(row["doc"]) if task.multiple_input else row["target"]
    choices = task.doc_to_choice(row["doc"])
    right = [gold] if not isinstance(gold, (list, tuple)) else list(gold)
    places = [choices.index(one) if isinstance(one, str) else int(one) for one in right]
    totals = [responses[0][0] for responses in row["resps"][: len(choices)]]
    return sum(gold_probability(totals, place) for place in places)


def _gold_responses(
    task: Any, rows: Sequence[Mapping[str, Any]], lm: AnswerLM
) -> list[tuple[tuple[str, ...], float]]:
    """Ask how likely the right response is where the model was asked to write one."""
    instances = []
    for row in rows:
        target = row["target"][0] if isinstance(row["target"], (list, tuple)) else row["target"]
        pair = (row["arguments"][0][0], f"{task.config.target_delimiter}{target}")
        instances.append(Instance(request_type="loglikelihood", doc=row["doc"], arguments=pair, idx=0))
    totals = _quietly(lambda: lm.loglikelihood(instances, disable_tqdm=True))
    return [(tuple(instance.args), total) for instance, (total, _) in zip(instances, totals, strict=True)]


def _main_metric(task: Any, row: Mapping[str, Any]) -> str | None:
    """Return the metric that is the task's score: the one that it names, else the first that goes by items."""
    metadata = task.config.metadata if isinstance(task.config.metadata, dict) else {}
    named = metadata.get("score")
    candidates = [named] if named else list(row["metrics"])
    better = task.higher_is_better()
    return next((name for name in candidates if _is_number(row.get(name)) and better.get(name, True)), None)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, str)


def _quietly(call: Callable[[], Any]) -> Any:
    """Call lm-eval without what it logs and prints as progress: hiplora says what matters itself."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            return call()
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
