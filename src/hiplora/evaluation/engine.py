"""lm-eval as the engine: a suite's tasks and items, loaded once, and a model's score on every item in two forms."""

import contextlib
import hashlib
import json
import logging
import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from hiplora.errors import ConfigError, DataError, HipLoraError, first_line
from hiplora.evaluation.suite import PREFIX, TASKS, Suite, TaskRequest
from hiplora.metrics import answer_likelihood, gold_probability

T = TypeVar("T")

GOLD = "mean probability of the gold choice"
ANSWER = "likelihood of a token of the answer"
TEXT = "likelihood of a token of the text"
_LOGITS = 1 << 30  # bytes of fp32 logits in memory at once


@dataclass(frozen=True)
class TaskScores:
    """A model's scores on a task, item by item, in per cent; higher is better.

    `score` is by the metric `name` (None where lm-eval has no metric per item: a perplexity), `likelihood` is its
    likelihood form, named by `form`. `others` are lm-eval's values of its other metrics.
    """

    name: str
    score: list[float] | None
    form: str
    likelihood: list[float]
    others: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the scores, without their names, as JSON values."""
        return {"score": self.score, "likelihood": self.likelihood, "others": self.others}


class ScoringLM(HFLM):
    """lm-eval's Hugging Face model over a loaded one, plain or with an adapter.

    Batches of long rows are split so that their logits fit in memory, and `tokens` keeps the number of tokens of every
    (context, answer) and rolling text that was scored: the divisor of a likelihood per token.
    """

    def __init__(self, model: torch.nn.Module, tokenizer: Any, batch_size: int = 8):
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.tokens: dict[tuple[str, ...], int] = {}

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, as lm-eval does."""
        self.tokens |= {request.args: len(self.tok_encode(request.args[0])) for request in requests}
        return super().loglikelihood_rolling(requests, disable_tqdm)

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> list[Any]:  # type: ignore[override]
        """Score rows of similar length together, as many at once as fit; their order is kept."""
        self.tokens |= {tuple(text): len(answer) for text, _, answer in requests if text is not None}
        buckets: dict[int, list[int]] = {}
        for index, (_, context, answer) in enumerate(requests):
            length = min(len(context) + len(answer), self.max_length)
            buckets.setdefault(length.bit_length(), []).append(index)
        found: list[Any] = [None] * len(requests)
        whole: int = self.batch_size  # type: ignore[assignment]
        try:
            for bits, places in buckets.items():
                fitting = _LOGITS // (4 * self.vocab_size * min(1 << bits, self.max_length))
                self.batch_size_per_gpu = max(1, min(whole, fitting))
                scored = super()._loglikelihood_tokens([requests[i] for i in places], *args, **kwargs)
                for place, score in zip(places, scored, strict=True):
                    found[place] = score
        finally:
            self.batch_size_per_gpu = whole
        return found


class Engine:
    """A suite's tasks with their items chosen: every model sees the same items in the same order."""

    def __init__(
        self,
        suite: Suite,
        *,
        data: Path | None = None,
        limit: int | None = None,
        seed: int = 0,
        allow_code: bool = False,
    ):
        """Load the tasks' rows and draw `limit` of each by `seed` (all if None).

        Raises:
            ConfigError: lm-eval does not know a task, or a task runs code and that was not allowed.
            DataError: a task's rows cannot be loaded.
        """
        self.suite, self.seed, self._allow_code = suite, seed, allow_code
        self._requests = {request.name: request for request in suite.tasks}
        self._tasks = _load_tasks(suite, data)
        for task in self._tasks.values():
            if getattr(task, "UNSAFE_CODE", False):
                from hiplora.evaluation.sandbox import require_permission

                require_permission(allow_code)
        self._chosen = {
            name: _choose(len(task.eval_docs), self._requests[name].limit or limit, f"{seed}:{name}")
            for name, task in self._tasks.items()
        }

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, as in the suite."""
        return list(self._tasks)

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return, per task, its title, its items' places in the data, and a hash of their contents."""
        found = {}
        for name, task in self._tasks.items():
            rows = [task.eval_docs[index] for index in self._chosen[name]]
            text = json.dumps(rows, sort_keys=True, default=str)
            found[name] = {
                "title": str(_metadata(task).get("title", name)),
                "items": self._chosen[name],
                "of": len(task.eval_docs),
                "sha256": hashlib.sha256(text.encode()).hexdigest(),
            }
        return found

    def prompts(self) -> list[str]:
        """Return a few contexts of the first task: what `check_adapters` runs on."""
        name = self.tasks[0]
        _quietly(lambda: self._tasks[name].build_all_requests(samples=self._chosen[name]))
        return [str(instance.args[0]) for instance in self._tasks[name].instances[:2]]

    def score(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int = 8,
        tasks: Sequence[str] | None = None,
        progress: bool = False,
    ) -> dict[str, TaskScores]:
        """Score a model on every chosen item of the tasks (all of the suite if None).

        Sampled responses are drawn from the engine's seed, so that a model that is scored again scores the same.
        `progress` shows lm-eval's bars on a terminal.
        """
        names = list(tasks or self.tasks)
        lm = _quietly(lambda: ScoringLM(model, tokenizer, batch_size))
        loaded = {self._requests[name].lm_eval: self._tasks[name] for name in names}
        samples = {self._requests[name].lm_eval: self._chosen[name] for name in names}
        torch.manual_seed(self.seed)
        random.seed(self.seed)
        found = _quietly(
            lambda: evaluate(
                lm,
                {"tasks": loaded, "groups": {}},
                samples=samples,
                bootstrap_iters=0,
                confirm_run_unsafe_code=self._allow_code,
            ),
            progress,
        )
        return {name: self._scores(name, found, lm) for name in names}

    def _scores(self, name: str, found: Mapping[str, Any], lm: ScoringLM) -> TaskScores:
        task, key = self._tasks[name], self._requests[name].lm_eval
        rows = sorted(found["samples"][key], key=lambda row: row["doc_id"])
        first = rows[0]["filter"]
        rows = [row for row in rows if row["filter"] == first]
        form, likelihood = _likelihoods(task, rows, lm)
        metric = _main_metric(task, rows[0])
        score = None if metric is None else [100.0 * float(row[metric]) for row in rows]
        others: dict[str, float] = {}
        for result, value in found["results"][key].items():
            other, _, filtered = result.partition(",")
            if filtered == first and not other.endswith("_stderr") and other != metric and _is_number(value):
                others[other] = float(value)
        return TaskScores(metric or next(iter(others), form), score, form, likelihood, others)


def foreign_tasks() -> frozenset[str]:
    """Return the names of lm-eval's own tasks, without groups; it takes seconds."""
    return frozenset(_quietly(TaskManager).all_subtasks)


def _load_tasks(suite: Suite, data: Path | None) -> dict[str, Any]:
    own = all(request.lm_eval.startswith(PREFIX) for request in suite.tasks)
    if data is not None and not data.is_dir():
        raise DataError(f"--data {data}: no such folder")
    paths = [str(TASKS), *map(str, suite.include)]
    folder = {"data": str(data)} if data is not None else {}  # reaches the tasks' own loaders
    manager = _quietly(lambda: TaskManager(include_path=paths, include_defaults=not own, metadata=folder))
    return {request.name: _load_one(manager, request) for request in suite.tasks}


def _load_one(manager: TaskManager, request: TaskRequest) -> Any:
    if request.lm_eval not in manager.all_tasks:
        known = [name.removeprefix(PREFIX) for name in manager.all_tasks if name.startswith(PREFIX)]
        raise ConfigError(
            f"--suite: task {request.name!r} is not known; expected one of {', '.join(known)}, one of lm-eval's "
            "(lm_eval ls tasks), or one of the folders that a suite file includes"
        )
    try:
        loaded = _quietly(lambda: manager.load([request.lm_eval]))["tasks"]
    except HipLoraError:
        raise
    except Exception as error:  # whatever the task's own loader raises
        raise DataError(f"--suite: task {request.name} cannot be loaded ({first_line(error)})") from error
    if len(loaded) != 1:
        raise ConfigError(
            f"--suite: {request.name} is a group of {len(loaded)} tasks; name the tasks themselves: "
            f"{', '.join(sorted(loaded)[:6])}{', …' if len(loaded) > 6 else ''}"
        )
    return next(iter(loaded.values()))


def _choose(count: int, limit: int | None, seed: str) -> list[int]:
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), limit))


def _metadata(task: Any) -> Mapping[str, Any]:
    return task.config.metadata if isinstance(task.config.metadata, dict) else {}


def _likelihoods(task: Any, rows: Sequence[Mapping[str, Any]], lm: ScoringLM) -> tuple[str, list[float]]:
    """Return the likelihood form of a task's score: its name, and its value in per cent, item by item."""
    if task.OUTPUT_TYPE == "multiple_choice":
        return GOLD, [_gold(task, row) for row in rows]
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        pairs = [(tuple(row["arguments"][0]), row["resps"][0][0]) for row in rows]
    elif task.OUTPUT_TYPE == "loglikelihood":
        pairs = [(tuple(row["arguments"][0]), row["resps"][0][0][0]) for row in rows]
    else:
        pairs = _reference_answers(task, rows, lm)
    form = TEXT if task.OUTPUT_TYPE == "loglikelihood_rolling" else ANSWER
    return form, [answer_likelihood(total, lm.tokens[pair]) for pair, total in pairs]


def _gold(task: Any, row: Mapping[str, Any]) -> float:
    gold = task.doc_to_text(row["doc"]) if task.multiple_input else row["target"]
    choices = task.doc_to_choice(row["doc"])
    right = list(gold) if isinstance(gold, (list, tuple)) else [gold]
    places = [choices.index(one) if isinstance(one, str) else int(one) for one in right]
    totals = [responses[0][0] for responses in row["resps"][: len(choices)]]
    return sum(gold_probability(totals, place) for place in places)


def _reference_answers(
    task: Any, rows: Sequence[Mapping[str, Any]], lm: ScoringLM
) -> list[tuple[tuple[str, ...], float]]:
    """Score the right response where the model was asked to write one."""
    instances = []
    for row in rows:
        target = row["target"][0] if isinstance(row["target"], (list, tuple)) else row["target"]
        pair = (row["arguments"][0][0], f"{task.config.target_delimiter}{target}")
        instances.append(Instance(request_type="loglikelihood", doc=row["doc"], arguments=pair, idx=0))
    totals = _quietly(lambda: lm.loglikelihood(instances, disable_tqdm=True))
    return [(tuple(instance.args), total) for instance, (total, _) in zip(instances, totals, strict=True)]


def _main_metric(task: Any, row: Mapping[str, Any]) -> str | None:
    """Return the metric that is the task's score: the one it names, else the first with a value per item."""
    named = _metadata(task).get("score")
    better = task.higher_is_better()
    candidates = [named] if named else list(row["metrics"])
    return next((name for name in candidates if _is_number(row.get(name)) and better.get(name, True)), None)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _quietly(call: Callable[[], T], progress: bool = False) -> T:
    """Call lm-eval without its log, and without its bars unless `progress` is asked for on a terminal."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.ExitStack() as stack:
            if not (progress and sys.stderr.isatty()):
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            return call()
    finally:
        logging.disable(disabled)
