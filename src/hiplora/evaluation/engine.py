"""lm-eval as the engine: a suite's tasks and items, loaded once, and a model's score on every item in two forms."""

import contextlib
import hashlib
import json
import logging
import os
import random
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluate as metrics
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from hiplora.errors import ConfigError, DataError, HipLoraError, first_line
from hiplora.evaluation.evaluate import EvalSettings
from hiplora.evaluation.likelihood import LOGITS_BYTES, can_pad, pad_left, without_end
from hiplora.evaluation.suite import PREFIX, TASKS, Suite, TaskRequest, own_tasks, runs_code
from hiplora.evaluation.tasks.rows import own_task
from hiplora.metrics import answer_likelihood, gold_probability

GOLD = "mean probability of the gold choice"
ANSWER = "likelihood of a token of the answer"
TEXT = "likelihood of a token of the text"


@dataclass(frozen=True)
class TaskScores:
    """A model's scores on a task, item by item, in per cent; higher is better.

    `score` is by `metric` (None where lm-eval has no metric per item: a perplexity), `likelihood` is its likelihood
    form, named by `form`. `others` are lm-eval's values of its other metrics.
    """

    metric: str
    score: list[float] | None
    form: str
    likelihood: list[float]
    others: dict[str, float]


class ScoringLM(HFLM):
    """lm-eval's Hugging Face model over a loaded one, plain or with an adapter; long rows go in smaller batches.

    End tokens that a tokenizer adds to a text are removed; tokenizers without an end token work too. The blanks that
    end one of the `own_prompts`, which lm-eval scores with the answer, are its context, as in training.
    """

    def __init__(self, model: torch.nn.Module, tokenizer: Any, batch_size: int = 8, own_prompts: Collection[str] = ()):
        self._own_prompts = own_prompts
        specials = (getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad"))
        prefix = next((token for token in specials if token is not None), None)
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, prefix_token_id=prefix)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text; where there is none, the padding token, which is never written."""
        end = self.tokenizer.eos_token_id
        return self.tokenizer.pad_token_id if end is None else end

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """Tokenize a text to score or to continue."""
        return without_end(self.tokenizer, string, super().tok_encode(string, *args, **kwargs))

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokenize texts to continue; returns ids and mask."""
        rows = [self.tok_encode(text, left_truncate_len=left_truncate_len) for text in strings]
        return pad_left(rows, self.tokenizer.pad_token_id)[:2]

    def generate_until(self, *args: Any, **kwargs: Any) -> list[str]:
        """Continue texts as lm-eval does, one by one if the model reads its padding."""
        with self._batches_of(self.batch_size if can_pad(self.model, [1, 2]) else 1):
            return super().generate_until(*args, **kwargs)

    @contextlib.contextmanager
    def _batches_of(self, size: int) -> Iterator[None]:
        previous: int = self.batch_size  # type: ignore[assignment]
        self.batch_size_per_gpu = size
        try:
            yield
        finally:
            self.batch_size_per_gpu = previous

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokenize as lm-eval does; an answer that merges into its context, where lm-eval stops, is tokenized alone."""
        if context in self._own_prompts:
            prompt, whole = self.tok_encode(context), self.tok_encode(context + continuation)
            if whole[: len(prompt)] == prompt and len(whole) > len(prompt):  # as hiplora trains them
                return prompt, whole[len(prompt) :]
        prompt, answer = super()._encode_pair(context, continuation) if context else ([], [])
        return prompt, answer or self.tok_encode(continuation, add_special_tokens=False)

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> list[Any]:  # type: ignore[override]
        """Score rows of similar length together, as many at once as their logits leave memory for."""
        for text, _, answer in requests:
            if not 0 < len(answer) <= self.max_length:
                raise DataError(
                    f"the answer {str(text and text[1])[:60]!r} has {len(answer)} tokens; expected 1 to "
                    f"{self.max_length}, the model's context: leave its row out"
                )
        sizes = [min(len(context) + len(answer), self.max_length).bit_length() for _, context, answer in requests]
        batch_size: int = self.batch_size  # type: ignore[assignment]
        scores: dict[int, Any] = {}
        for bits in sorted(set(sizes)):
            indices = [index for index, size in enumerate(sizes) if size == bits]
            fitting = LOGITS_BYTES // (4 * self.vocab_size * min(1 << bits, self.max_length))
            with self._batches_of(max(1, min(batch_size, fitting))):
                scored = super()._loglikelihood_tokens([requests[index] for index in indices], *args, **kwargs)
            scores |= zip(indices, scored, strict=True)
        return [scores[index] for index in range(len(requests))]


class Engine:
    """A suite's tasks with their items chosen: every model sees the same items in the same order."""

    def __init__(self, suite: Suite, settings: EvalSettings, tokenizer: Any):
        """Load the tasks' rows and draw the items; the user's own rows are worded for the model with this tokenizer.

        ConfigError if lm-eval does not know a task, or would run code that was not allowed; DataError if a task's rows
        cannot be loaded.
        """
        if suite.include and not settings.allow_suite_code:
            raise ConfigError(
                f"--suite: includes {', '.join(map(str, suite.include))}: task files there may run any code on this "
                "machine (functions, templates); pass --allow-suite-code if you trust them"
            )
        self._own = [request.name for request in suite.tasks if request.rows]
        self._settings, self._keys = settings, {request.name: request.lm_eval for request in suite.tasks}
        self._tasks = _load_tasks(suite, settings.folder, tokenizer)
        if any(getattr(task, "UNSAFE_CODE", False) for task in self._tasks.values()):
            from hiplora.evaluation.sandbox import require_permission

            require_permission(settings.allow_code)
        self._chosen: dict[str, list[int]] = {}
        for request in suite.tasks:
            count = len(self._tasks[request.name].eval_docs)
            size = min(n for n in (request.limit, settings.limit, count) if n)
            chosen = random.Random(f"{settings.seed}:{request.name}").sample(range(count), size)
            self._chosen[request.name] = sorted(chosen)

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return, per task, its title, the indices of its items in the data, and a hash of their contents."""
        descriptions = {}
        for name, task in self._tasks.items():
            text = json.dumps([task.eval_docs[index] for index in self._chosen[name]], sort_keys=True, default=str)
            descriptions[name] = {
                "title": str(_metadata(task).get("title", name)),
                "items": self._chosen[name],
                "of": len(task.eval_docs),
                "sha256": hashlib.sha256(text.encode()).hexdigest(),
            }
        return descriptions

    def prompts(self) -> list[str]:
        """Return a few contexts of the first task, for `check_adapters`."""
        name, task = next(iter(self._tasks.items()))
        with _lm_eval():
            task.build_all_requests(samples=self._chosen[name])
        return [str(instance.args[0]) for instance in task.instances[:2]]

    def score(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int = 8,
        tasks: Sequence[str] | None = None,
        progress: bool = False,
    ) -> dict[str, TaskScores]:
        """Score a model on every chosen item of the tasks (all if None); `progress` shows lm-eval's bars on a terminal.

        Sampled responses are drawn from the settings' seed, so that a model that is scored again scores the same.
        """
        keys = {name: self._keys[name] for name in tasks or self._tasks}
        torch.manual_seed(self._settings.seed)
        random.seed(self._settings.seed)
        own_prompts = {doc.get("prompt") for name in self._own for doc in self._tasks[name].eval_docs} - {None}
        with _lm_eval(progress):
            lm = ScoringLM(model, tokenizer, batch_size, own_prompts)
            results = evaluate(
                lm,
                {"tasks": {key: self._tasks[name] for name, key in keys.items()}, "groups": {}},
                samples={key: self._chosen[name] for name, key in keys.items()},
                bootstrap_iters=0,
                confirm_run_unsafe_code=self._settings.allow_code,
            )
            return {name: _scores(self._tasks[name], results, key, lm) for name, key in keys.items()}


def foreign_tasks() -> frozenset[str]:
    """Return the names of lm-eval's own tasks, without groups; takes seconds."""
    with _lm_eval():
        return frozenset(TaskManager().all_subtasks)


def _load_tasks(suite: Suite, data: Path | None, tokenizer: Any) -> dict[str, Any]:
    if data is not None and not data.is_dir():
        raise DataError(f"--data {data}: no such folder")
    own = all(request.rows or request.lm_eval.startswith(PREFIX) for request in suite.tasks)
    metadata = {"data": str(data)} if data is not None else {}  # lm-eval passes it to the tasks' loaders
    tasks = {}
    with _lm_eval():
        paths = [str(TASKS), *map(str, suite.include)]
        manager = TaskManager(include_path=paths, include_defaults=not own, metadata=metadata)
        for request in suite.tasks:
            if request.rows is None:
                _check_name(manager, request)
            try:
                task: Any = own_task(request.lm_eval, request.rows, tokenizer) if request.rows else request.lm_eval
                (tasks[request.name],) = manager.load([task])["tasks"].values()
            except HipLoraError:
                raise
            except Exception as error:  # whatever the task's own loader raises
                raise DataError(f"--suite: task {request.name} cannot be loaded ({first_line(error)})") from error
    return tasks


def _check_name(manager: TaskManager, request: TaskRequest) -> None:
    """Check that lm-eval knows a task, that it is not a group, and that it runs no code outside the sandbox.

    Imports no function that the task's file names.
    """
    name, key = request.name, request.lm_eval
    if key not in manager.all_tasks:
        known = [task.removeprefix(PREFIX) for task in manager.all_tasks if task.startswith(PREFIX)]
        raise ConfigError(
            f"--suite: task {name!r} is not known; expected one of {', '.join(known)}, one of lm-eval's "
            "(lm_eval ls tasks), or one of the folders that a suite file includes"
        )
    if key not in manager.all_subtasks:
        raise ConfigError(f"--suite: {name} is a group of tasks; name the tasks themselves (lm_eval ls tasks)")
    file = manager.task_index[key].yaml_path
    if not key.startswith(PREFIX) and file and load_yaml(file, resolve_func=False).get("unsafe_code"):
        raise ConfigError(
            f"--suite: lm-eval's {name} runs what the model writes outside any sandbox; score "
            f"{', '.join(filter(runs_code, own_tasks()))} instead"
        )


def _metadata(task: Any) -> Mapping[str, Any]:
    return task.config.metadata if isinstance(task.config.metadata, dict) else {}


def _scores(task: Any, results: Mapping[str, Any], key: str, lm: ScoringLM) -> TaskScores:
    """Return a task's scores from lm-eval's results, by the first of its filters."""
    rows = sorted(results["samples"][key], key=lambda row: row["doc_id"])
    rows = [row for row in rows if row["filter"] == rows[0]["filter"]]
    form, likelihood = _likelihoods(task, rows, lm)
    # The task's score: the metric that it names, else the first with a value per item.
    score_name, higher_is_better, row = _metadata(task).get("score"), task.higher_is_better(), rows[0]
    candidates = [score_name] if score_name else row["metrics"]
    usable = (
        name for name in candidates if isinstance(row.get(name), int | float) and higher_is_better.get(name, True)
    )
    metric = next(usable, None)
    others: dict[str, float] = {}
    for result, value in results["results"][key].items():
        other, _, filter_name = result.partition(",")
        reported = filter_name == row["filter"] and not other.endswith("_stderr") and other != metric
        if reported and isinstance(value, int | float):
            others[other] = float(value)
    score = None if metric is None else [100.0 * float(row[metric]) for row in rows]
    return TaskScores(metric or next(iter(others), form), score, form, likelihood, others)


def _likelihoods(task: Any, rows: Sequence[Mapping[str, Any]], lm: ScoringLM) -> tuple[str, list[float]]:
    """Return the likelihood form of a task's score: its name, and its value in per cent, item by item."""
    form, kind = ANSWER, task.OUTPUT_TYPE
    if kind == "multiple_choice":
        return GOLD, [_gold(task, row) for row in rows]
    if kind == "loglikelihood_rolling":
        form, lengths = TEXT, [len(lm.tok_encode(row["arguments"][0][0])) for row in rows]
        totals = [row["resps"][0][0] for row in rows]
    else:
        pairs = [row["arguments"][0] for row in rows]
        if kind == "loglikelihood":
            scored = [row["resps"][0][0] for row in rows]
        else:  # the model was asked to write: score the right response
            targets = [row["target"][0] if isinstance(row["target"], (list, tuple)) else row["target"] for row in rows]
            delimiter = task.config.target_delimiter
            pairs = [(pair[0], f"{delimiter}{target}") for pair, target in zip(pairs, targets, strict=True)]
            requests = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs]
            scored = lm.loglikelihood(requests, disable_tqdm=True)
        totals, lengths = [total for total, _ in scored], [len(lm._encode_pair(*pair)[1]) for pair in pairs]
    return form, [answer_likelihood(total, length) for total, length in zip(totals, lengths, strict=True)]


def _gold(task: Any, row: Mapping[str, Any]) -> float:
    gold = task.doc_to_text(row["doc"]) if task.multiple_input else row["target"]
    choices = task.doc_to_choice(row["doc"])
    answers = gold if isinstance(gold, (list, tuple)) else [gold]
    indices = [choices.index(answer) if isinstance(answer, str) else int(answer) for answer in answers]
    totals = [responses[0][0] for responses in row["resps"][: len(choices)]]
    return sum(gold_probability(totals, index) for index in indices)


@contextlib.contextmanager
def _lm_eval(progress: bool = False) -> Iterator[None]:
    """Silence lm-eval's log inside the block, and its bars but for `progress` on a terminal.

    Metrics are never read from the working directory: `evaluate.load` prefers a folder there, and would run its code.
    """
    load = metrics.load

    def load_from_elsewhere(path: str, *args: Any, **kwargs: Any) -> Any:
        if Path(path).exists():
            raise ConfigError(f"{Path(path).resolve()}: has the name of a metric, and its code would run; move it")
        return load(path, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        stack.callback(logging.disable, logging.root.manager.disable)
        stack.callback(setattr, metrics, "load", load)
        logging.disable(logging.WARNING)
        metrics.load = load_from_elsewhere
        if not (progress and sys.stderr.isatty()):
            stack.enter_context(contextlib.redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
        yield
