"""The tokenized rows that a recipe trains on, and a preview of them."""

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hiplora.data.encoding import IGNORED, EncodingReport, encode_examples, shown
from hiplora.data.examples import TrainingData, load_data, skipped
from hiplora.data.texts import ROW_LENGTH
from hiplora.devices import machine_dtype, pick_device, torch_dtype
from hiplora.errors import DataError
from hiplora.models import load_tokenizer
from hiplora.positions import context_length, position_limit, within_context
from hiplora.training.adapt import check_fit
from hiplora.training.recipe import TrainRecipe

if TYPE_CHECKING:
    from datasets import Dataset

# Training and held-out rows as tokens, notes for the user, and counts of the training rows.
Rows = tuple[list[dict[str, list[int]]], list[dict[str, list[int]]], list[str], EncodingReport]


def tokenized(recipe: TrainRecipe, data: TrainingData, tokenizer: Any, model: Any) -> Rows:
    """Tokenize the training and the held-out rows; the model may be without weights."""
    length = within_context(recipe.train.max_length, model)
    bad: list[str] | None = [] if recipe.data.skip_bad_rows else None
    rows, report = encode_examples(tokenizer, data.train, length, bad)
    notes = [*data.notes, *report.warnings(length), *_too_long(rows, model)]
    held_out: list[dict[str, list[int]]] = []
    if data.held_out:
        held_out, held_out_report = encode_examples(tokenizer, data.held_out, length, bad)
        notes += [f"held out: {note}" for note in held_out_report.warnings(length)]
    return rows, held_out, [*notes, *skipped(bad)], report


def sequences(
    recipe: TrainRecipe, encoded: Rows, model: Any
) -> "tuple[Dataset, Dataset | None, list[str], dict[str, int]]":
    """Return the training and held-out sequences, notes for the user, and counts."""
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    from hiplora.training.losses import mask_unlikely, replay_rows

    settings, length = recipe.train, within_context(recipe.train.max_length, model)
    rows, held_out, notes, report = encoded
    if settings.token_weight == "stm":
        removed = mask_unlikely(model, rows)
        rows = [row for row in rows if any(label != IGNORED for label in row["labels"][1:])]
        if not rows:
            raise DataError("train.token_weight: stm leaves no token to learn: the model finds all of them unlikely")
        notes.append(f"stm leaves out {removed:,} of {report.learned_tokens:,} tokens")
    if settings.replay:
        rows += replay_rows(model, replayed(recipe, len(rows)), length)
    sets = [Dataset.from_list(part) for part in (rows, held_out) if part]
    if settings.packing:
        sets = [pack_dataset(part, length, "bfd") for part in sets]
    text = getattr(recipe.method, "calibration_text", None)
    if text and recipe.data.path and Path(text).resolve() == Path(recipe.data.path).resolve():
        notes.append(
            "method.calibration_text is the training data: what the layers do on it is protected from being changed, "
            "so little will be learned; calibrate on other text, or leave it out to sample text from the model"
        )
    return sets[0], sets[1] if held_out else None, notes, vars(report)


def _too_long(rows: list[dict[str, list[int]]], model: Any) -> list[str]:
    """Return a note if rows are longer than the context that the model was made for, where its positions allow it."""
    context = context_length(model)
    count = sum(len(row["input_ids"]) > context for row in rows) if context else 0
    what = f"{count} of {len(rows)} rows are longer than the {context} tokens that the model was made for"
    return [f"{what} (max_position_embeddings); set train.max_length: {context}"] if count else []


def keeps_rows_apart(model: Any) -> bool:
    """Return whether rows that follow each other in one sequence do not see each other: packed, or without padding.

    Most attention layers read from restarting position ids where a row begins; others (ALiBi, state spaces) do not.
    """
    import torch

    ids, positions = torch.arange(16, device=model.device) % 11, torch.arange(16, device=model.device) % 8
    vocabulary, limit = model.config.get_text_config().vocab_size, position_limit(model) or 0
    has_mask_buffer = any(buffer.dim() == 4 and buffer.shape[-1] == limit for buffer in model.buffers())
    rows = torch.arange(16, device=model.device, dtype=torch.int32) // 8  # TRL gives the row of each token too
    try:
        with torch.no_grad():
            packed = {"position_ids": positions[None], "seq_idx": rows[None], "use_cache": False}
            both = model(input_ids=ids[None] % vocabulary, **packed).logits[0, 8:]
            alone = model(input_ids=ids[None, 8:] % vocabulary, use_cache=False).logits[0]
            if has_mask_buffer:  # which may limit the tokens of a sequence, whatever their positions
                positions = torch.arange(limit + 1, device=model.device) % limit
                model(input_ids=positions[None] % vocabulary, position_ids=positions[None], use_cache=False)
    except (ValueError, TypeError, RuntimeError):  # refused, or no position ids
        return False
    tolerance = 1e-3 if alone.dtype == torch.float32 else 3e-2
    return bool((both - alone).abs().max() <= tolerance * alone.abs().max())


def preview(recipe: TrainRecipe, count: int) -> tuple[dict[str, Any], str]:
    """Return a preview of what a recipe trains on: a record for machines, and a text.

    It has `count` tokenized rows, with what is learned in ⟦ ⟧, and the cost. Raises the errors of the recipe and the
    data that `train` finds before it loads a model.
    """
    bare = check_fit(recipe)
    tokenizer, settings = load_tokenizer(recipe.model), recipe.train
    length = within_context(settings.max_length, bare)
    data = load_data(recipe.data, chat=bool(tokenizer.chat_template))
    rows, _, notes, report = tokenized(recipe, data, tokenizer, bare)
    texts = [shown(tokenizer, row) for row in rows[:count]]
    learned = f"{report.learned_tokens:,} of {report.tokens:,} tokens are learned"
    added = replayed(recipe, len(rows))
    count, total = len(rows) + added, report.tokens + added * min(ROW_LENGTH, length)
    steps = None if settings.packing and settings.steps is None else count_steps(recipe, count)
    batch = settings.batch_size * settings.gradient_accumulation
    tokens = (settings.epochs or 1) * total
    if settings.steps is not None:
        tokens = settings.steps * batch * (length if settings.packing else total / count)
    seconds = rough_seconds(bare, tokens)
    cost = f"{steps or 'fewer, longer'} steps of {batch} sequences, roughly {duration(seconds)} here"
    lines = [f"row {number}\n{text}\n" for number, text in enumerate(texts, 1)]
    lines += [f"{report.sequences:,} rows, {learned}; {cost}", *notes]
    record = {"schema": 1, "kind": "preview", "rows": texts, "data": vars(report), "steps": steps, "seconds": seconds}
    return {**record, "notes": notes}, "\n".join(lines)


def rough_seconds(bare: Any, tokens: float) -> float:
    """Estimate the seconds of a training on so many tokens, from the size of a model and the time of one product."""
    import torch
    from transformers.pytorch_utils import Conv1D

    device, dtype = pick_device("auto"), torch_dtype(machine_dtype())
    x, weight = (torch.ones(size, 1024, device=device, dtype=dtype) for size in (512, 1024))
    for _ in range(3):  # the first warms up
        began = time.perf_counter()
        float((x @ weight)[0, 0])
    per_product = (time.perf_counter() - began) / (512 * 1024 * 1024)
    layers = [module for module in bare.modules() if isinstance(module, (torch.nn.Linear, Conv1D))]
    return 2 * tokens * per_product * sum(layer.weight.numel() for layer in layers)  # forward, backward to the inputs


def duration(seconds: float) -> str:
    """Format a time for reading: 40 s, 3 min, 2.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def replayed(recipe: TrainRecipe, count: int) -> int:
    """Return how many rows the base model writes beside so many training rows."""
    return math.ceil(recipe.train.replay / (1 - recipe.train.replay) * count)


def count_steps(recipe: TrainRecipe, count: int) -> int:
    """Return the optimizer steps of a training on so many sequences."""
    settings = recipe.train
    batches = recipe.method.batches(count, settings.batch_size)
    return settings.steps or math.ceil((settings.epochs or 1) * math.ceil(batches / settings.gradient_accumulation))
