"""The verdict in plain words, computed from the numbers alone: it says who did better, or that nobody did.

Two rules keep it honest. Differences that one run cannot carry are called "about the same": less than 5 % of
the drop in loss, less than 10 % of a drift, fewer than two edits. And whoever did better is named first,
whichever method that is.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hiplora.reporting._old_plots.energy import share
from hiplora.reporting.averages import common_texts, mean_kl, mean_perplexity_ratio, mean_success
from hiplora.reporting.numbers import change, fixed, mean, percent, significant, times
from hiplora.reporting.palette import is_hiplora, plain
from hiplora.reporting.results import Drift, EditRun, Inspection, Method, Results

OURS = ("hiploraactivation", "hiplora")
LOSS_TOLERANCE, DRIFT_TOLERANCE, EDIT_TOLERANCE = 0.05, 0.10, 2


@dataclass(frozen=True)
class Verdict:
    """One sentence for the top of the page, and the sentences that carry it."""

    headline: str
    sentences: tuple[str, ...] = ()


def verdict(results: Results) -> Verdict:
    """Say what the results show: of a demo what survives the merge, of a comparison learning against drift."""
    if results.edits and (found := _edits_verdict(results)) is not None:
        return found
    return _methods_verdict(results)


def inspection_verdict(inspection: Inspection) -> Verdict:
    """Say how much of an adapter's update lies in the directions that the base model depends on."""
    touched, both = share(inspection.modules, "touched"), share(inspection.modules, "both")
    if touched is None:
        return Verdict("The spectral allocation of this adapter was not measured.")
    rank = f"top {inspection.principal_rank:.0f}" if inspection.principal_rank else "leading"
    left, right = share(inspection.modules, "left"), share(inspection.modules, "right")
    return Verdict(
        f"{percent(touched)} of this update's energy touches the {rank} singular directions of the base weights.",
        (
            f"{percent(left)} is written into the leading output directions, {percent(right)} is read from the leading "
            f"input directions, {percent(both)} does both; the rest leaves them alone.",
        ),
    )


def contenders(names: Iterable[str]) -> tuple[str, str] | None:
    """Return the pair to compare, (HiP-LoRA, baseline): plain LoRA where it is there, else the first other.

    Of several variants of HiP-LoRA the one with the activation basis, else the paper's.
    """
    ordered = list(names)
    if len(ordered) < 2:
        return None
    ours = next((n for known in OURS for n in ordered if plain(n) == known), None)
    ours = ours or next((name for name in ordered if is_hiplora(name)), ordered[-1])
    others = [name for name in ordered if name != ours]
    return ours, next((name for name in others if plain(name) == "lora"), others[0])


# ---- a comparison of methods


def _methods_verdict(results: Results) -> Verdict:
    pair = contenders(method.name for method in results.methods)
    if pair is None:
        return _single_verdict(results.methods[0]) if results.methods else Verdict("Nothing was measured.")
    by_name = {method.name: method for method in results.methods}
    ours, base = by_name[pair[0]], by_name[pair[1]]
    learned, drifted = _learned(ours, base), _drifted(ours.drift, base.drift)
    sentences = [*_loss_words(ours, base), *_drift_words(ours.name, ours.drift, base.name, base.drift)]
    sentences += _others(results.methods, pair)
    return Verdict(_headline(ours.name, base.name, learned, drifted), tuple(sentences))


def _single_verdict(method: Method) -> Verdict:
    kl = mean(row.kl for row in method.drift)
    parts = []
    if method.loss_before is not None and method.loss_after is not None:
        parts.append(f"took the held-out loss from {fixed(method.loss_before)} to {fixed(method.loss_after)}")
    if kl is not None:
        parts.append(f"drifted {significant(kl)} nats per token from the base model on other text")
    return Verdict(
        f"{method.name} {' and '.join(parts)}."
        if parts
        else f"{method.name} was trained; nothing was measured."
    )


def _learned(ours: Method, base: Method) -> int | None:
    """+1: ours learned more, 0: as much, −1: less; None: not measured."""
    if ours.loss_after is None or base.loss_after is None:
        return None
    befores = [
        loss for loss in (ours.loss_before, base.loss_before) if loss is not None and math.isfinite(loss)
    ]
    gap = base.loss_after - ours.loss_after
    drop = max((before - min(ours.loss_after, base.loss_after) for before in befores), default=0.0)
    tolerance = LOSS_TOLERANCE * drop if drop > 0 else 0.01 * abs(base.loss_after)
    return 0 if math.isnan(gap) or abs(gap) <= tolerance else 1 if gap > 0 else -1


def _drifted(ours: Sequence[Drift], base: Sequence[Drift]) -> float | None:
    """The base's mean KL over ours (above one: ours drifted less), on the texts that both have; None: unknown."""
    mine, theirs = _mean_kls(ours, base)
    if mine is None or theirs is None or (math.isinf(mine) and math.isinf(theirs)):
        return None
    if mine <= 0 or theirs <= 0:
        return 1.0 if mine <= 0 and theirs <= 0 else math.inf if mine <= 0 else 0.0
    return theirs / mine


def _mean_kls(ours: Sequence[Drift], base: Sequence[Drift]) -> tuple[float | None, float | None]:
    if not ours or not base:
        return None, None
    means = mean_kl({"ours": ours, "base": base})
    return means["ours"], means["base"]


def _headline(ours: str, base: str, learned: int | None, ratio: float | None) -> str:
    sign = None if ratio is None else _sign(ratio)
    learning = {
        1: f"learned more than {base}",
        0: f"learned as much as {base}",
        -1: f"learned less than {base}",
    }
    if learned is None and ratio is None:
        return f"{ours} and {base} were trained; neither loss nor drift was measured."
    if ratio is None:
        return f"{ours} {learning[learned or 0]}; drift was not measured."
    if learned is None:
        return (
            f"{ours} {_drift_clause(ratio, f' than {base}', f' as {base}')}; held-out loss was not measured."
        )
    if learned == 0 and sign == 0:
        return (
            f"{ours} and {base} did about the same: no difference in learning or drift that one run can show."
        )
    if learned <= 0 and sign is not None and sign <= 0:
        return f"{base} did better here: {ours} {learning[learned]} and {_drift_clause(ratio)}."
    joined = "and" if sign is not None and min(learned, sign) >= 0 else "but"
    return f"{ours} {learning[learned]} {joined} {_drift_clause(ratio)}."


def _sign(ratio: float) -> int:
    return 0 if 1 - DRIFT_TOLERANCE < ratio < 1 + DRIFT_TOLERANCE else 1 if ratio > 1 else -1


def _drift_clause(ratio: float, than: str = "", same: str = "") -> str:
    """Say a drift ratio in words: 6.1 times less, 23 % less, about as far, 30 % further, 2.3 times as far."""
    whence = " from the base model"
    if _sign(ratio) == 0:
        return f"drifted about as far{same}{whence}"
    if math.isinf(ratio):
        return f"did not drift{whence} at all"
    if ratio >= 2:
        return f"drifted {times(ratio)} less{than}{whence}"
    if ratio > 1:
        return f"drifted {percent(1 - 1 / ratio)} less{than}{whence}"
    if ratio == 0:
        return f"drifted{whence}, which {than.removeprefix(' than ') or 'the other'} did not"
    if ratio > 0.5:
        return f"drifted {percent(1 / ratio - 1)} further{than}{whence}"
    return f"drifted {times(1 / ratio)} as far{same or than.replace('than', 'as')}{whence}"


def _loss_words(ours: Method, base: Method) -> list[str]:
    if ours.loss_after is None or base.loss_after is None:
        return []
    before = ours.loss_before if ours.loss_before is not None else base.loss_before
    start = f"from {fixed(before)} " if before is not None else ""
    return [
        f"Held-out loss went {start}to {fixed(ours.loss_after)} with {ours.name} and to {fixed(base.loss_after)} with "
        f"{base.name} (nats per response token; lower is better)."
    ]


def _drift_words(our_name: str, ours: Sequence[Drift], base_name: str, base: Sequence[Drift]) -> list[str]:
    mine, theirs = _mean_kls(ours, base)
    if mine is None or theirs is None:
        return []
    pair = {"ours": ours, "base": base}
    texts = common_texts(pair, lambda row: row.kl)
    where = f"{len(texts)} texts" if len(texts) > 1 else f"“{texts[0]}”"
    words = (
        f"On other text ({where}) the predictions moved by {significant(mine)} nats per token (KL divergence) with "
        f"{our_name} and by {significant(theirs)} with {base_name}"
    )
    if len(texts) > 1:
        kls = [{row.text: row.kl or 0.0 for row in rows} for rows in (ours, base)]
        words += f"; {our_name} moved less on {sum(kls[0][t] < kls[1][t] for t in texts)} of {len(texts)}"
    ratios = mean_perplexity_ratio(pair)
    if ratios["ours"] is not None and ratios["base"] is not None:
        words += f". Perplexity there changed by {change(ratios['ours'])} and {change(ratios['base'])}"
    return [f"{words}."]


def _others(methods: Sequence[Method], pair: tuple[str, str]) -> list[str]:
    """One sentence for each further method, and who was best where that is none of the pair."""
    sentences = []
    for method in methods:
        kl = mean(row.kl for row in method.drift)
        if method.name not in pair and (method.loss_after is not None or kl is not None):
            sentences.append(
                f"{method.name}: held-out loss {fixed(method.loss_after)}, KL divergence {significant(kl)}."
            )
    return sentences


# ---- edits and their merge


def _edits_verdict(results: Results) -> Verdict | None:
    pair = contenders(run.name for run in results.edits)
    if pair is None:
        run = results.edits[0]
        if run.survival is None:
            return None
        return Verdict(f"Added together, {run.name}'s adapters kept {percent(run.survival)} of their edits.")
    by_name = {run.name: run for run in results.edits}
    ours, base = by_name[pair[0]], by_name[pair[1]]
    if ours.survival is None or base.survival is None:
        return None
    total = sum(count for count in results.edit_counts.values() if count)
    sentences = [*_alone_words(ours, base, results), *_after_words(ours, base)]
    if (ratio := _drifted(ours.drift, base.drift)) is not None:
        clause = _drift_clause(ratio, f" than {base.name}'s", f" as {base.name}'s")
        sentences.append(
            f"The merged {ours.name} model {clause} on other text ({_kl_pair(ours, base)} nats per token)."
        )
    kls = mean_kl({run.name: run.drift for run in results.edits})
    sentences += [
        f"{run.name}: {percent(run.overall)} work after the merge, KL divergence {significant(kls[run.name])}."
        for run in results.edits
        if run.name not in pair and run.overall is not None
    ]
    return Verdict(_survival_headline(ours, base, total, ratio), tuple(sentences))


def _survival_headline(ours: EditRun, base: EditRun, total: float, ratio: float | None) -> str:
    mine, theirs = ours.survival or 0.0, base.survival or 0.0
    tolerance = EDIT_TOLERANCE / total if total else 0.05
    if ours.overall is not None and base.overall is not None:
        gap = ours.overall - base.overall
        if abs(gap) >= tolerance and gap * (mine - theirs) < 0:
            # Many of few, or few of many: neither share alone is the whole truth.
            more, fewer = (ours, base) if gap > 0 else (base, ours)
            return (
                f"After the merge more edits work with {more.name} ({percent(more.overall)}) than with {fewer.name} "
                f"({percent(fewer.overall)}), although {fewer.name} kept a larger share of those that it had made "
                f"({percent(fewer.survival)} against {percent(more.survival)})."
            )
    if abs(mine - theirs) < tolerance:
        return (
            f"Added together, both methods' adapters kept about as many of their edits: {percent(mine)} with "
            f"{ours.name}, {percent(theirs)} with {base.name}."
        )
    if mine > theirs:
        return (
            f"Added together, {ours.name}'s adapters kept {percent(mine)} of their edits, "
            f"{base.name}'s {percent(theirs)}."
        )
    kept = f"{percent(theirs)} of their edits, {ours.name}'s {percent(mine)}"
    if ratio is not None and _sign(ratio) > 0:
        clause = _drift_clause(ratio, f" than {base.name}'s").removesuffix(" from the base model")
        return f"Mixed: added together, {base.name}'s adapters kept {kept}; but the merged {ours.name} model {clause}."
    return f"{base.name} did better here: added together, its adapters kept {kept}."


def _alone_words(ours: EditRun, base: EditRun, results: Results) -> list[str]:
    mine, theirs = (
        mean_success(ours.alone, results.edit_counts),
        mean_success(base.alone, results.edit_counts),
    )
    if mine is None or theirs is None:
        return []
    before = mean_success(results.base_success, results.edit_counts)
    known = f" (the base model before any edit: {percent(before)})" if before is not None else ""
    return [
        f"Alone, {percent(mine)} of the edits work with {ours.name} and {percent(theirs)} with {base.name}{known}."
    ]


def _after_words(ours: EditRun, base: EditRun) -> list[str]:
    if ours.overall is None or base.overall is None:
        return []
    return [
        f"After the merge {percent(ours.overall)} work with {ours.name} and {percent(base.overall)} with {base.name}."
    ]


def _kl_pair(ours: EditRun, base: EditRun) -> str:
    mine, theirs = _mean_kls(ours.drift, base.drift)
    return f"KL divergence {significant(mine)} against {significant(theirs)}"
