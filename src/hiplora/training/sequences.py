"""The tokenized rows of a recipe: what is trained on, and a preview of it."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hiplora.data.examples import TrainingData, load_data
from hiplora.errors import DataError
from hiplora.models import load_tokenizer
from hiplora.training.recipe import TrainRecipe

if TYPE_CHECKING:
    from datasets import Dataset


def sequences(
    recipe: TrainRecipe, data: TrainingData, tokenizer: Any, model: Any
) -> "tuple[Dataset, Dataset | None, list[str], dict[str, int]]":
    """Return the training and held-out sequences, what the user should know about them, and counts."""
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    from hiplora.data.encoding import encode_examples
    from hiplora.training.losses import mask_unlikely, replay_rows

    settings, length = recipe.train, recipe.train.max_length
    rows, report = encode_examples(tokenizer, data.train, length)
    notes = [*data.notes, *report.warnings(length)]
    if settings.token_weight == "stm":
        taken = mask_unlikely(model, rows)
        if taken == report.learned_tokens:
            raise DataError("train.token_weight: stm leaves no token to learn: the model finds all of them unlikely")
        notes.append(f"stm leaves out {taken:,} of {report.learned_tokens:,} tokens")
    if settings.replay:
        rows += replay_rows(model, math.ceil(settings.replay / (1 - settings.replay) * len(rows)), length)
    parts = [rows, *([encode_examples(tokenizer, data.held_out, length)[0]] if data.held_out else [])]
    sets = [Dataset.from_list(part) for part in parts]
    if settings.packing:
        sets = [pack_dataset(part, length, "bfd") for part in sets]
    text = getattr(recipe.method, "calibration_text", None)
    if text and recipe.data.path and Path(text).resolve() == Path(recipe.data.path).resolve():
        notes.append(
            "method.calibration_text is the training data: what the layers do on it is protected from being changed, "
            "so little will be learned; calibrate on other text, or leave it out to sample text from the model"
        )
    return sets[0], sets[1] if data.held_out else None, notes, vars(report)


def keeps_rows_apart(model: Any) -> bool:
    """Return whether rows that follow each other in one sequence do not see each other: packed, or without padding.

    Most attention layers read from restarting position ids where a row begins; others (ALiBi, state spaces) do not.
    """
    import torch

    ids, places = torch.arange(16, device=model.device) % 11, torch.arange(16, device=model.device) % 8
    vocabulary = model.config.get_text_config().vocab_size
    try:
        with torch.no_grad():
            both = model(input_ids=ids[None] % vocabulary, position_ids=places[None], use_cache=False).logits[0, 8:]
            alone = model(input_ids=ids[None, 8:] % vocabulary, use_cache=False).logits[0]
    except (ValueError, TypeError):  # refused, or no position ids
        return False
    close = 1e-3 if alone.dtype == torch.float32 else 3e-2
    return bool((both - alone).abs().max() <= close * alone.abs().max())


def preview(recipe: TrainRecipe, count: int) -> str:
    """Return what a recipe would train on: `count` tokenized rows, what is learned in ⟦ ⟧, and the cost."""
    from hiplora.data.encoding import encode_examples, shown

    tokenizer, settings = load_tokenizer(recipe.model), recipe.train
    data = load_data(recipe.data, chat=bool(tokenizer.chat_template))
    rows, report = encode_examples(tokenizer, data.train, settings.max_length)
    lines = [f"row {number}\n{shown(tokenizer, row)}\n" for number, row in enumerate(rows[:count], 1)]
    learned = f"{report.learned_tokens:,} of {report.tokens:,} tokens are learned"
    steps = count_steps(recipe, len(rows)) if not settings.packing else settings.steps or "fewer, longer"
    batch = settings.batch_size * settings.gradient_accumulation
    lines.append(f"{report.sequences:,} rows, {learned}; {steps} steps of {batch} sequences")
    return "\n".join([*lines, *data.notes, *report.warnings(settings.max_length)])


def count_steps(recipe: TrainRecipe, count: int) -> int:
    """Return the optimizer steps of a training on so many sequences."""
    settings = recipe.train
    batches = recipe.method.batches(count, settings.batch_size)
    return settings.steps or math.ceil((settings.epochs or 1) * math.ceil(batches / settings.gradient_accumulation))
