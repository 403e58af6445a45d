"""What editing did to unrelated prompts, held against answers of the bare base that were frozen before any edit."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hiplora.editing.asking import BATCH_SIZE, answer_length, answer_log_probs, continuations
from hiplora.editing.edits import Edit, Question
from hiplora.editing.success import begins_with, normalise
from hiplora.errors import AdapterError, DataError
from hiplora.metrics import locality
from hiplora.tuner import model_fingerprint


@dataclass(frozen=True)
class Reference:
    """What the bare base says to unrelated questions; later measurements compare with it and never ask the base again.

    One value a question: `continuations` (greedy), `correct` (they begin with the true answer, normalised),
    `log_probs` of the true answers and `edited_log_probs` of `edited_targets`, new answers of the edits that have
    nothing to do with the question; all in nats. `base` is the fingerprint of the model's weights, `length` how many
    tokens are written, `batch_size` how many questions are asked together.
    """

    questions: tuple[Question, ...]
    edited_targets: tuple[str, ...]
    continuations: tuple[str, ...]
    correct: tuple[bool, ...]
    log_probs: tuple[float, ...]
    edited_log_probs: tuple[float, ...]
    base: str
    length: int
    batch_size: int

    @classmethod
    def freeze(
        cls,
        model: nn.Module,
        tokenizer: Any,
        questions: Sequence[Question],
        edits: Sequence[Edit],
        batch_size: int = BATCH_SIZE,
    ) -> "Reference":
        """Ask the bare base; to be called before the first edit.

        Raises:
            AdapterError: the model has an adapter on it.
            DataError: there are no questions or no edits, or a question is about the subject of an edit.
        """
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise AdapterError(
                "the model has an adapter on it, so its answers are not the base's; freeze the reference before editing"
            )
        _check(questions, edits)
        targets = _targets(questions, edits)
        length = answer_length(tokenizer, [(item.prompt, item.answer) for item in questions])
        said = _ask(model, tokenizer, questions, targets, length, batch_size)
        return cls(tuple(questions), targets, *said, model_fingerprint(model), length, batch_size)

    def as_dict(self) -> dict[str, Any]:
        """Return the record for a JSON file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Reference":
        """Read the record back."""
        questions = tuple(Question(**item) for item in record["questions"])
        rest: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in record.items()
            if key != "questions"
        }
        return cls(questions, **rest)


@dataclass(frozen=True)
class LocalityOutcome:
    """What an edited model says to the questions of a reference; one value a question, as there.

    `unchanged` is whether it writes exactly what the base wrote.
    """

    continuations: tuple[str, ...]
    correct: tuple[bool, ...]
    unchanged: tuple[bool, ...]
    log_probs: tuple[float, ...]
    edited_log_probs: tuple[float, ...]

    def summary(self, reference: Reference) -> dict[str, float]:
        """Return accuracy before and after and the unchanged share in per cent, the accuracy change in points.

        `log_prob_change` is the mean change of the true answers' log-probability in nats, `edited_log_prob_change` of
        the edits' new answers, where they do not belong.
        """
        found = locality(reference.correct, self.correct, reference.log_probs, self.log_probs)
        leaked = locality(
            reference.correct, self.correct, reference.edited_log_probs, self.edited_log_probs
        ).log_prob_change
        count = len(self.correct)
        assert found.log_prob_change is not None
        assert leaked is not None
        return {
            "questions": count,
            "accuracy_before": 100 * sum(reference.correct) / count,
            "accuracy": 100 * sum(self.correct) / count,
            "accuracy_change": found.accuracy_change,
            "unchanged": 100 * sum(self.unchanged) / count,
            "log_prob_change": found.log_prob_change,
            "edited_log_prob_change": leaked,
        }


def measure_locality(model: nn.Module, tokenizer: Any, reference: Reference) -> LocalityOutcome:
    """Ask an edited model the questions of a reference, in the same batches."""
    written, correct, log_probs, edited = _ask(
        model,
        tokenizer,
        reference.questions,
        reference.edited_targets,
        reference.length,
        reference.batch_size,
    )
    same = tuple(now == then for now, then in zip(written, reference.continuations, strict=True))
    return LocalityOutcome(written, correct, same, log_probs, edited)


def _ask(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    targets: Sequence[str],
    length: int,
    batch_size: int,
) -> tuple[tuple[str, ...], tuple[bool, ...], tuple[float, ...], tuple[float, ...]]:
    """Return continuations, whether they are right, and log-probabilities of true answers and of others."""
    prompts = [item.prompt for item in questions]
    written = continuations(model, tokenizer, prompts, length, batch_size)
    correct = tuple(begins_with(text, item.answer) for text, item in zip(written, questions, strict=True))
    true = [(item.prompt, item.answer) for item in questions]
    other = list(zip(prompts, targets, strict=True))
    sums = answer_log_probs(model, tokenizer, true + other, batch_size)
    return tuple(written), correct, tuple(sums[: len(true)]), tuple(sums[len(true) :])


def _targets(questions: Sequence[Question], edits: Sequence[Edit]) -> tuple[str, ...]:
    """For each question a new answer of an edit, in turn, that is not the question's own answer."""
    news = [edit.new for edit in edits]
    chosen = []
    for index, question in enumerate(questions):
        turn = (news[(index + step) % len(news)] for step in range(len(news)))
        chosen.append(next((new for new in turn if normalise(new) != normalise(question.answer)), news[0]))
    return tuple(chosen)


def _check(questions: Sequence[Question], edits: Sequence[Edit]) -> None:
    if not questions or not edits:
        raise DataError(
            f"{len(questions)} questions and {len(edits)} edits; locality needs at least one of each"
        )
    edited = {edit.subject.casefold() for edit in edits}
    for question in questions:
        if question.subject.casefold() in edited:
            raise DataError(
                f"question {question.prompt!r} is about {question.subject}, which is edited; leave one of them out"
            )
