"""The model as lm-eval sees it: lm-eval's own Hugging Face model, with less to compute for the same numbers.

Answers to one question share its tokens (one pass over question and all answers), answers of one token share
the whole pass, logits are computed only where something is scored, and batches hold rows of similar length.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn

Tokens = tuple[int, ...]
Scored = tuple[float, bool]
# The form that lm-eval hands over: (the two strings, or None), tokens of the context, tokens of the answer.
Request = tuple[Any, list[int], list[int]]

_POSITIONS = 4096  # whose logits are in memory at once
# Nats a token: how far the shared pass may be from separate ones before it is not trusted.
_AGREEMENT, _AGREEMENT_HALF = 1e-4, 5e-2


@dataclass
class Question:
    """Tokens that several answers follow, and the answers, each with the requests that asked for it."""

    context: Tokens
    answers: dict[Tokens, list[int]] = field(default_factory=dict)

    @property
    def branches(self) -> list[Tokens]:
        """What is read after the context: of each answer of several tokens, all but the last."""
        return [answer[:-1] for answer in self.answers if len(answer) > 1]

    @property
    def length(self) -> int:
        """Tokens of the row that reads the question with all its answers."""
        return len(self.context) + self.span

    @property
    def span(self) -> int:
        """Positions after the last of the context."""
        return sum(map(len, self.branches))

    def pays(self, limit: int) -> bool:
        """Whether reading the context once saves enough to be worth a mask: half of what the answers take, at least."""
        saved = len(self.context) * (len(self.branches) - 1)
        return self.length <= limit and 2 * saved >= self.span


class AnswerLM(HFLM):
    """lm-eval's model over a loaded one, for causal models; what it returns is what lm-eval's own returns.

    `tokens` holds the number of tokens of every (context, answer) that was scored, and of every rolling text: what a
    likelihood per token is divided by. `on_progress` is called with the number of requests done since the last call.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        batch_size: int = 8,
        on_progress: Callable[[int], None] | None = None,
    ):
        """Wrap a loaded model, plain or with an adapter on it."""
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.tokens: dict[tuple[str, ...], int] = {}
        self._on_progress = on_progress or (lambda done: None)
        self._reads_rows = _takes_positions(model)
        self._may_share, self._tried = _takes_masks(model), False

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """As lm-eval's, and remember how many tokens each text has."""
        for request in requests:
            (text,) = request.args
            self.tokens[(text,)] = len(self.tok_encode(text))
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As lm-eval's."""
        done = super().generate_until(requests, disable_tqdm=True)
        self._on_progress(len(requests))
        return done

    @torch.no_grad()
    def _loglikelihood_tokens(  # type: ignore[override]
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Scored]:
        if not self._reads_rows:
            return self._as_lm_eval(requests, override_bs)
        found: list[Scored] = [(0.0, False)] * len(requests)
        for batch in _batches(self._questions(requests), int(self.batch_size)):
            for question, answers in zip(batch, self._score(batch), strict=True):
                for (_, asked), scored in zip(question.answers.items(), answers, strict=True):
                    for index in asked:
                        found[index] = scored
            self._on_progress(sum(len(asked) for q in batch for asked in q.answers.values()))
        return found

    def _as_lm_eval(self, requests: Sequence[Request], override_bs: int | None) -> list[Scored]:
        for text, _, answer in requests:
            if text is not None:
                self.tokens[tuple(text)] = len(answer)
        found = super()._loglikelihood_tokens(list(requests), disable_tqdm=True, override_bs=override_bs)
        self._on_progress(len(requests))
        return found

    def _questions(self, requests: Sequence[Request]) -> list[Question]:
        """Gather the requests by their context; one that is too long loses its beginning, as with lm-eval."""
        found: dict[Tokens, Question] = {}
        for index, (text, context, answer) in enumerate(requests):
            if text is not None:
                self.tokens[tuple(text)] = len(answer)
            room = self.max_length + 1 - len(answer)
            kept = tuple(context[-room:]) if room > 0 else ()
            found.setdefault(kept, Question(kept)).answers.setdefault(tuple(answer), []).append(index)
        shared = [q for q in found.values() if len(q.branches) > 1 and q.pays(self.max_length)]
        if shared and self._may_share and not self._tried:
            self._may_share = self._shares_well(min(shared, key=lambda q: q.length))
            self._tried = True
        return [
            part
            for question in found.values()
            for part in (
                [question] if self._may_share and question.pays(self.max_length) else _apart(question)
            )
        ]

    def _shares_well(self, question: Question) -> bool:
        """Whether a question with its answers in one pass scores as the answers in passes of their own do."""
        try:
            together = self._score([question])[0]
        except (ValueError, RuntimeError, TypeError):  # an attention that takes no mask of this shape
            return False
        agreement = _AGREEMENT if self.model.dtype == torch.float32 else _AGREEMENT_HALF
        for (answer, _), (shared, _) in zip(question.answers.items(), together, strict=True):
            single: dict[Tokens, list[int]] = {answer: []}
            alone = self._score([Question(question.context, single)])[0][0][0]
            if abs(shared - alone) > agreement * len(answer):
                return False
        return True

    def _score(self, batch: Sequence[Question]) -> list[list[Scored]]:
        """Return, a question, what its answers score, in their order."""
        keep = 1 + max(question.span for question in batch)
        logits = self.model(**self._inputs(batch), logits_to_keep=keep, use_cache=False).logits[:, -keep:]
        return [_answers_scored(question, row) for question, row in zip(batch, logits, strict=True)]

    def _inputs(self, batch: Sequence[Question]) -> dict[str, Tensor]:
        """Rows that end together: tokens, the positions they stand at, and who may look at whom."""
        width = max(question.length for question in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        positions = torch.zeros_like(ids)
        for row, question in enumerate(batch):
            start = width - question.length
            tokens = [*question.context, *(token for branch in question.branches for token in branch)]
            ids[row, start:] = torch.tensor(tokens)
            positions[row, start:] = torch.tensor(_positions(question))
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": self._mask(batch, width)}
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def _mask(self, batch: Sequence[Question], width: int) -> Tensor:
        """A mask of the tokens that are there; of who sees whom where a question has several branches."""
        if all(len(question.branches) <= 1 for question in batch):
            mask = torch.zeros(len(batch), width, dtype=torch.long)
            for row, question in enumerate(batch):
                mask[row, width - question.length :] = 1
            return mask
        seen = torch.eye(width, dtype=torch.bool).repeat(len(batch), 1, 1)
        for row, question in enumerate(batch):
            start = width - question.length
            seen[row, start:, start:] = _visible(question)
        dtype = self.model.dtype
        hidden = torch.full(seen.shape, torch.finfo(dtype).min, dtype=dtype)
        return hidden.masked_fill_(seen, 0.0)[:, None]


def _takes_positions(model: nn.Module) -> bool:
    """Whether the model can be told where tokens stand and which logits are wanted; else lm-eval's own way is taken."""
    bare: Any = model
    bare = bare.get_base_model() if hasattr(bare, "get_base_model") else bare
    return {"position_ids", "logits_to_keep"} <= set(inspect.signature(bare.forward).parameters)


def _takes_masks(model: nn.Module) -> bool:
    """Whether the model's attention takes a mask of its caller's; windows and Flash kernels do not."""
    config: Any = model.config
    if getattr(config, "sliding_window", None) or getattr(config, "alibi", False):
        return False
    return getattr(config, "_attn_implementation", "eager") in ("eager", "sdpa")


def _apart(question: Question) -> Iterator[Question]:
    """The question once for each answer of several tokens; those of one token stay together."""
    short: dict[Tokens, list[int]] = {
        answer: asked for answer, asked in question.answers.items() if len(answer) == 1
    }
    if short:
        yield Question(question.context, short)
    for answer, asked in question.answers.items():
        if len(answer) > 1:
            alone: dict[Tokens, list[int]] = {answer: asked}
            yield Question(question.context, alone)


def _batches(questions: list[Question], size: int) -> Iterator[list[Question]]:
    """Batches of similar length, longest first, few enough rows that their logits fit into memory."""
    batch: list[Question] = []
    for question in sorted(questions, key=lambda q: -q.length):
        positions = (1 + max(question.span, *(q.span for q in batch), 0)) * (len(batch) + 1)
        if batch and (len(batch) == size or positions > _POSITIONS):
            yield batch
            batch = []
        batch.append(question)
    if batch:
        yield batch


def _positions(question: Question) -> list[int]:
    length = len(question.context)
    return [*range(length), *(length + i for branch in question.branches for i in range(len(branch)))]


def _visible(question: Question) -> Tensor:
    """(length, length): each token sees the context and its own branch, up to itself."""
    visible = torch.ones(question.length, question.length, dtype=torch.bool).tril_()
    start = len(question.context)
    for branch in question.branches:
        visible[start + len(branch) :, start : start + len(branch)] = False
        start += len(branch)
    return visible


def _answers_scored(question: Question, logits: Tensor) -> list[Scored]:
    """Score a question's answers from the logits (keep, vocabulary) at the end of its row."""
    logits = logits[len(logits) - 1 - question.span :]  # the last of the context, then the branches
    scored, start = [], 1
    for answer in question.answers:
        inner = len(answer) - 1
        rows = logits[[0, *range(start, start + inner)]]
        start += inner
        target = torch.tensor(answer, device=rows.device)
        chosen = rows.float().log_softmax(-1).gather(1, target[:, None])
        scored.append((chosen.sum().item(), bool((rows.argmax(-1) == target).all())))
    return scored
