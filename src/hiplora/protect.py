"""Project a trained adapter off its layers' inputs, and measure drift and loss before and after."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hiplora.adapters import (
    AdapterUpdate,
    BaseWeights,
    check_projection,
    has_words,
    load_for,
    open_update,
    protect,
    remaining,
    save_as_lora,
)
from hiplora.adapters.base import is_product
from hiplora.adapters.protection import module_rank
from hiplora.data.texts import calibration_rows, describe_source, drift_texts, overlap, text_source
from hiplora.errors import ConfigError
from hiplora.evaluation.drift import cut_windows
from hiplora.evaluation.updates import (
    DRIFT_TOKENS,
    DRIFT_WINDOW,
    check_scale_options,
    measure_updates,
    search_scale,
    task_rows,
)
from hiplora.files import Inputs
from hiplora.models import load_tokenizer
from hiplora.spectral import MAX_VECTORS, MomentBasis, RankSpec
from hiplora.tuner import GRADIENT_TOKENS, SELF, TOKENS_PER_INPUT, CalibrationText
from hiplora.tuner.experts import unrolled

MASKS = ("inputs", "joint")
Moments = Mapping[str, MomentBasis]


def protect_adapter(
    adapter_dir: str | os.PathLike | AdapterUpdate,
    path: str | os.PathLike,
    *,
    principal_rank: RankSpec = 32,
    mask: str = "inputs",
    projection: str = "hard",
    strength: float = 1.0,
    text: str | Path | None = None,
    tokens: int = 10_000,
    seed: int = 0,
    data: str | Path | None = None,
    drift_text: str | Path | None = None,
    scale: float | None = None,
    tolerance: float | None = None,
    base: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Project a trained adapter off its layers' inputs, measure that, and write the result as a plain LoRA folder.

    `principal_rank`, `projection` and `strength` are those of `hiplora.adapters.protect`. Mask "joint" removes pairs of
    directions of inputs and outputs, as few as give the same drift to second order: more of the update stays, at four
    times its rank.

    Args:
        text: a file or a data set on the hub, of which `tokens` are read; else they are sampled from the base model.
        data: a file with rows of the adapter's task, whose loss is measured.
        drift_text: a file with text to measure drift on, else prose and code of Python's own.
        scale: multiply the result by this number; `tolerance`: by the smallest number at which the loss on `data`
            rises by so many nats at most.
        base: base model, path or name, instead of the one in the adapter's configuration.
        device: to measure on, in bf16 on a GPU; "auto" is a GPU where there is one.

    Returns:
        a JSON-ready record: `norm_share` (what is left of the update's ‖ΔW‖²; `modules`: of each), `drift` before and
        after, `loss` on the task data, if any, `notes`, and the `export`'s own record.

    Raises:
        AdapterError: the adapter cannot be read, does not fit the base model, or changes nothing.
        ConfigError, DataError: `path` exists, or a setting, text or data cannot be used. Nothing is written then.
    """
    check_projection(principal_rank, strength, projection)
    if mask not in MASKS:
        raise ConfigError(f"mask is {mask!r}; expected one of {', '.join(MASKS)}")
    if mask == "joint" and (projection, strength) != ("hard", 1.0):
        raise ConfigError("mask 'joint' takes no projection and no strength; leave them out")
    check_scale_options(scale, tolerance, data)
    inputs: Inputs = {"the data": data, "the text": text, "the drift text": drift_text}
    update = open_update(adapter_dir, path, overwrite, base=base, inputs=inputs)
    # Errors in the inputs are raised before the model loads.
    if not has_words(update):
        raise ConfigError(
            f"{update.source}: is for {update.base}, which is no causal language model; protect measures on text, so "
            "name an adapter of one that is"
        )
    tokenizer, texts, skeleton = load_tokenizer(update.base), drift_texts(drift_text), BaseWeights.of(update).skeleton
    cut_windows(tokenizer, texts, DRIFT_WINDOW, DRIFT_TOKENS)
    rows = None if text is None else calibration_rows(tokenizer, text, tokens, skeleton)
    examples, notes = ([], []) if data is None else task_rows(tokenizer, data, skeleton)
    decoded = [tokenizer.decode(row, skip_special_tokens=True) for row in rows or ()]
    if shared := [f"{share:.0%} of “{name}”" for name, share in overlap(texts, decoded).items() if share]:
        notes.insert(0, f"the calibration text holds drift text too: {', '.join(shared)}")
    model: Any = load_for(update, device)
    calibration_text = CalibrationText(model, rows=rows, tokens=tokens, seed=seed)
    with unrolled(model):
        bases, outputs = _moments(calibration_text, update, mask, model)
    projected = protect(update, bases, principal_rank, strength, projection, outputs)
    search = None if tolerance is None else search_scale(model, projected, examples, tolerance)
    scale = search["scale"] if search else 1.0 if scale is None else scale
    projected = projected.scaled(scale)
    both = {"before": update, "after": projected}
    drift, loss = measure_updates(model, tokenizer, both, texts, examples, may_be_nothing={"after"})
    scored: dict[str, Any] = {}
    if data is not None:
        scored = {"file": Path(data).name, "rows": len(examples), "tokens": sum(len(one.scored) for one in examples)}
    shares, norm_share = remaining(update, projected)
    calibrated = min(moment.tokens for moment in bases.values())
    record: dict[str, Any] = {
        "schema": 1,
        "kind": "protection",
        "adapter": update.source,
        "base": update.base,
        "method": update.kind,
        "principal_rank": principal_rank,
        "mask": mask,
        "projection": projection,
        "strength": strength,
        "scale": scale,
        "scale_search": search,
        "calibration": {"source": SELF if text is None else describe_source(text), "tokens": calibrated},
        "modules": [
            {"module": module, "k": module_rank(principal_rank, bases[module], module), "norm_share": share}
            for module, share in shares.items()
        ],
        "norm_share": norm_share,
        "drift": drift,
        "drift_text": text_source(drift_text),
        "loss": {**loss, **scored} or None,
        "notes": [*notes, *_notes(update, projected, bases)],
    }
    del model  # the export's check loads its own
    details = {"protection": record}
    return record | {"export": save_as_lora(projected, path, overwrite=overwrite, device=device, details=details)}


def _moments(text: CalibrationText, update: AdapterUpdate, mask: str, model: Any) -> tuple[Moments, Moments | None]:
    """Return the eigenvectors of each layer's inputs and, for pairs of directions, of its output gradients."""
    not_linear = [name for name in update.modules if not is_product(model.get_submodule(name))]
    if not_linear and mask != "inputs":
        raise ConfigError(
            f"layer {not_linear[0]}: is no linear layer, so that its outputs have no directions; use --mask inputs"
        )
    inputs = text.inputs(list(update.factors))
    if mask == "inputs":
        return inputs, None
    widths = {module: min(update.shape(module)[0], MAX_VECTORS) for module in update.factors}
    return inputs, text.outputs(widths, GRADIENT_TOKENS)


def _notes(before: AdapterUpdate, after: AdapterUpdate, bases: Moments) -> Iterator[str]:
    """Yield caveats on the numbers."""
    if before.extras:
        yield f"modules_to_save ({', '.join(sorted(before.extras))}) are kept: only low-rank updates are projected"
    widest = max(inputs.vectors.shape[0] for inputs in bases.values())
    tokens = min(inputs.tokens for inputs in bases.values())
    if tokens < (needed := TOKENS_PER_INPUT * widest):
        yield f"calibrated on {tokens} tokens, few for inputs {widest} wide: give at least {needed}"
    if not any(A.any() and B.any() for A, B in after.factors.values()):
        yield "nothing of the low-rank update is left" + ("" if before.extras else ": the result is the base model")
