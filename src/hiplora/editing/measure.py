"""What a model says about edits, their neighbours and unrelated questions: success and locality (HiP-LoRA, C.4)."""

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
from torch import nn

from hiplora.editing.edits import CATEGORIES, Edit, Question
from hiplora.errors import DataError
from hiplora.evaluation.answers import continuations
from hiplora.evaluation.likelihood import encode, score_responses
from hiplora.metrics import locality
from hiplora.positions import context_length

BATCH_SIZE = 64  # prompts at once
EXTRA_TOKENS = 3  # generated beyond the longest answer, to see whether a match ends there
SHARES = ("success", "preferred", "exact")


def evaluate_edits(
    model: nn.Module, tokenizer: Any, edits: Sequence[Edit], *, paraphrase: bool = False
) -> pd.DataFrame:
    """Ask `model` each edit's prompt, or its paraphrase, and return a row an edit, in order.

    Columns: `preferred`, the paper's criterion log p(new) > log p(old), both teacher-forced; `exact`, whether the
    greedy continuation begins with the new answer as whole words (`normalise`); `success`, either of the two; each 0 or
    1; `log_prob_new` and `log_prob_old`, sums over the answer's tokens in nats; `written`, the continuation.
    """
    prompts = [str(edit.paraphrase) if paraphrase else edit.prompt for edit in edits]
    table = _answered(model, tokenizer, prompts, [edit.new for edit in edits], [str(edit.old) for edit in edits])
    preferred = (table.log_prob > table.other_log_prob).astype(int)
    table.insert(0, "preferred", preferred)
    table.insert(0, "success", preferred | table.exact)
    return table.rename(columns={"log_prob": "log_prob_new", "other_log_prob": "log_prob_old"})


def check_lengths(model: Any, tokenizer: Any, edits: Sequence[Edit]) -> None:
    """Raise DataError if the longest prompt and the longest answer, as asked together, exceed the model's context."""
    context = context_length(model) or tokenizer.model_max_length
    neighbours = [question for edit in edits for question in edit.neighbours]
    prompts = [text or "" for edit in edits for text in (edit.prompt, edit.paraphrase)]
    prompts += [question.prompt for question in neighbours]
    answers = [text or "" for edit in edits for text in (edit.new, edit.old)]
    answers += [question.answer for question in neighbours]
    texts = [max(candidates, key=lambda text: len(text.encode())) for candidates in (prompts, answers)]
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    if sum(lengths) + EXTRA_TOKENS >= context:
        raise DataError(
            f"edits: the longest prompt, {texts[0][:40]!r}, has {lengths[0]} tokens, and the longest answer, "
            f"{texts[1][:40]!r}, {lengths[1]}; the model's context is {context}: shorten them, or leave them out"
        )


def with_old_answers(model: nn.Module, tokenizer: Any, edits: Sequence[Edit]) -> list[Edit]:
    """Give edits without an old answer what the bare model writes in a line, of no more tokens than the new answer."""
    unanswered = [edit for edit in edits if not edit.old]
    sizes = [len(encode(tokenizer, edit.prompt, f" {edit.new}").scored) for edit in unanswered]
    room = max(sizes, default=0) + EXTRA_TOKENS
    written = continuations(model, tokenizer, [edit.prompt for edit in unanswered], room)
    olds = []
    for edit, size, text in zip(unanswered, sizes, written, strict=True):
        line = text.strip().partition("\n")[0] or "."
        whole = encode(tokenizer, edit.prompt, f" {line}")
        cut = tokenizer.decode(whole.ids[whole.scored[0] :][:size]).replace("\ufffd", "")  # within a character
        olds.append(cut.strip() or ".")
    answers = iter(olds)
    return [edit if edit.old else replace(edit, old=next(answers)) for edit in edits]


def measure_edits(model: nn.Module, tokenizer: Any, edits: Mapping[int, Edit]) -> pd.DataFrame:
    """Ask `model` about some edits of a run, given by their index; a row an edit.

    Columns: `index`, `category`, those of `evaluate_edits`, the same for the paraphrase as `paraphrase_…`, NaN without
    one, and `neighbours_kept`: of each question near the edit 1 if its true answer is likelier than the edit's new one,
    else 0.
    """
    chosen = list(edits.values())
    pairs = [(q.prompt, answer) for edit in chosen for q in edit.neighbours for answer in (q.answer, edit.new)]
    sums = iter(answer_log_probs(model, tokenizer, pairs))
    table = pd.DataFrame({"index": list(edits), "category": [edit.category for edit in chosen]})
    table["neighbours_kept"] = [[int(next(sums) > next(sums)) for _ in edit.neighbours] for edit in chosen]
    rows = [row for row, edit in enumerate(chosen) if edit.paraphrase]
    paraphrases = evaluate_edits(model, tokenizer, [chosen[row] for row in rows], paraphrase=True).set_axis(rows)
    return pd.concat([table, evaluate_edits(model, tokenizer, chosen), paraphrases.add_prefix("paraphrase_")], axis=1)


def summarise(records: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Return, for `all` edits and for each category that occurs, the number of `edits` and shares in per cent.

    `success`, `preferred` and `exact` as in `evaluate_edits`, the same of the paraphrases; `neighbours_kept` is the
    mean over edits of the share of their neighbours. What no edit has is left out.
    """
    groups = {"all": records} | {name: records[records["category"] == name] for name in CATEGORIES}
    columns = [prefix + name for prefix in ("", "paraphrase_") for name in SHARES]
    summaries = {}
    for name, group in groups.items():
        if len(group):
            kept = pd.Series([sum(row) / len(row) for row in group["neighbours_kept"] if row], dtype=float)
            means = group[columns].astype(float).mean().to_dict() | {"neighbours_kept": kept.mean()}
            shares = {key: 100 * mean for key, mean in means.items() if not math.isnan(mean)}
            summaries[name] = {"edits": len(group)} | shares
    return summaries


def unrelated_targets(questions: Sequence[Question], edits: Sequence[Edit]) -> list[str]:
    """Return for each question the new answer of an edit, each in turn, that is not the question's answer."""
    targets = []
    for index, question in enumerate(questions):
        news = [edit.new for edit in (*edits[index % len(edits) :], *edits)]
        targets.append(next((new for new in news if normalise(new) != normalise(question.answer)), edits[0].new))
    return targets


def ask(model: nn.Module, tokenizer: Any, questions: Sequence[Question], targets: Sequence[str]) -> pd.DataFrame:
    """Ask unrelated questions; a row a question.

    Columns: `written` (greedy), `correct` (begins with the true answer), and log-probabilities in nats: `log_prob` of
    the true answer, `edited_log_prob` of the target, which does not belong there.
    """
    prompts, answers = [item.prompt for item in questions], [item.answer for item in questions]
    table = _answered(model, tokenizer, prompts, answers, targets)
    return table.rename(columns={"exact": "correct", "other_log_prob": "edited_log_prob"})


def _answered(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], right: Sequence[str], other: Sequence[str]
) -> pd.DataFrame:
    """Return a row a prompt: whether the model writes the right answer (`exact`), and log p of it and of another."""
    answers = [encode(tokenizer, prompt, f" {answer}") for prompt, answer in zip(prompts, right, strict=True)]
    room = max((len(answer.scored) for answer in answers), default=0) + EXTRA_TOKENS
    written, count = continuations(model, tokenizer, prompts, room), len(prompts)
    sums = answer_log_probs(model, tokenizer, list(zip([*prompts, *prompts], [*right, *other], strict=True)))
    log_probs = {"log_prob": sums[:count], "other_log_prob": sums[count:]}
    return pd.DataFrame({"exact": _begins_with(written, right), **log_probs, "written": written})


def summarise_locality(before: pd.DataFrame, after: pd.DataFrame) -> dict[str, float | None]:
    """Compare two tables of `ask`: accuracies, their change and the share of unchanged answers, in per cent and points.

    The changes of log-probabilities are means in nats, of the true answers and of the targets.
    """
    true, edited = (
        locality(before["correct"], after["correct"], before[name], after[name])
        for name in ("log_prob", "edited_log_prob")
    )
    return {
        "questions": len(after),
        "accuracy_before": float(100 * before["correct"].mean()),
        "accuracy": float(100 * after["correct"].mean()),
        "accuracy_change": true.accuracy_change,
        "unchanged": float(100 * (before["written"] == after["written"]).mean()),
        "log_prob_change": true.log_prob_change,
        "edited_log_prob_change": edited.log_prob_change,
    }


def answer_log_probs(model: nn.Module, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Return log p(answer | prompt) of each `(prompt, answer)` in nats, summed over the answer's tokens.

    The answer follows the prompt after one space. DataError if an answer adds no token.
    """
    rows = [encode(tokenizer, prompt, f" {answer}") for prompt, answer in pairs]
    return [row.double().sum().item() for row in score_responses(model, rows, BATCH_SIZE)]


def normalise(text: str) -> str:
    """Return the form to compare: lower case, no punctuation but a number's, no leading article, single spaces."""
    plain = re.sub(r"(?<=\d),(?=\d)", "", unicodedata.normalize("NFKC", text).casefold())
    words = re.sub(r"(?<!\d)\.|\.(?!\d)|(?<=\w)-|-(?!\d)|[^\w\s.-]|_", " ", plain).split()
    return " ".join(words[1:] if words and words[0] in ("the", "a", "an") else words)


def _begins_with(written: Sequence[str], answers: Sequence[str]) -> pd.Series:
    """Return whether each text begins with its answer, as whole words, 0 or 1."""
    pairs = zip(written, answers, strict=True)
    begin = [f"{normalise(text)} ".startswith(f"{normalise(answer)} ") for text, answer in pairs]
    return pd.Series(begin, dtype=int)
