"""What editing will do: teaching, stage by stage, and asking about the edits and unrelated questions after each."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hiplora.editing import AlphaEdit
from hiplora.editing.job import ALPHAEDIT, DEFAULT_STEPS
from hiplora.models.shapes import ModelShape
from hiplora.study.estimate import Load, adapter_elements, calibration_load, full_settings, svd_load
from hiplora.study.steps.lengths import QUESTION, EditLengths

ASKED_AT_ONCE = 64
TRAINED_AT_ONCE = 16  # edits in a step, where nothing is said
PHRASINGS, ANSWERS = 2, 2  # the prompt and its paraphrase; the new and the old answer


@dataclass(frozen=True)
class Stages:
    """How many stages there are, how many edits each teaches, and how many edits are asked about in all of them."""

    count: int
    edits: int
    asked: int


def edit_load(settings: Mapping[str, Any], shape: ModelShape, each: EditLengths) -> Load:
    """Return the load of an `edit` job on such edits, without its drift; its method has every setting that is not a
    default.

    Raises:
        ConfigError: AlphaEdit's settings are none, or do not fit the model.
    """
    stages = stages_of(settings, each.rows)
    asked = stages.asked + stages.count * stages.edits  # before the first edit, too
    questions = settings["questions"] * (1 + stages.count)
    found = _asking(each, settings["neighbours"]).times(asked) + _asking_questions().times(questions)
    if settings["method"]["name"] == ALPHAEDIT:
        return found + _searching(settings, each, stages, shape)
    return found + _training(settings, each, stages, shape)


def stages_of(settings: Mapping[str, Any], rows: int) -> Stages:
    """Return the stages of an `edit` job on so many edits."""
    count = rows
    if settings["mode"] == "single":
        count = min(settings.get("sample") or count, count)
        return Stages(count, 1, count)
    size = min(settings.get("edits_per_batch") or count, count)
    stages = math.ceil(count / size)
    asked = sum(min(size * number, count) for number in range(1, stages + 1))
    return Stages(stages, size, asked if settings["mode"] == "sequential" else count)


def _asking(each: EditLengths, neighbours: bool) -> Load:
    """One edit, once: likelihoods of its answers, and what is written."""
    near = each.near if neighbours else 0.0
    pairs = ANSWERS * (PHRASINGS + near)
    return Load(
        forward_tokens=math.ceil((pairs + PHRASINGS) * each.tokens),
        generated_tokens=PHRASINGS * each.written,
        logit_positions=math.ceil(pairs * each.answer),
        batch_tokens=math.ceil(ASKED_AT_ONCE * each.tokens),
        sequence_length=math.ceil(each.tokens) + each.written,
        decode_batch=ASKED_AT_ONCE,
    )


def _asking_questions() -> Load:
    return Load(
        forward_tokens=math.ceil((ANSWERS + 1) * QUESTION.tokens),
        generated_tokens=QUESTION.written,
        logit_positions=math.ceil(ANSWERS * QUESTION.answer),
        batch_tokens=math.ceil(ASKED_AT_ONCE * QUESTION.tokens),
        sequence_length=math.ceil(QUESTION.tokens) + QUESTION.written,
        decode_batch=ASKED_AT_ONCE,
    )


def _training(settings: Mapping[str, Any], each: EditLengths, stages: Stages, shape: ModelShape) -> Load:
    method = full_settings(settings["method"])
    steps = settings.get("steps") or DEFAULT_STEPS[settings["mode"]][0]
    rows = min(settings.get("rows") or TRAINED_AT_ONCE, stages.edits)
    batch = math.ceil(rows * each.tokens)
    pissa = Load(svd_flops=svd_load(shape, method)) if method["name"] == "pissa" else Load()
    return pissa + Load(
        train_tokens=stages.count * steps * batch,
        logit_positions=math.ceil(stages.count * steps * rows * each.answer),
        batch_tokens=batch,
        train=True,
        sequence_length=math.ceil(each.tokens),
        factor_scalars=shape.factor_scalars(method),
        adapter_elements=adapter_elements(shape, method),
    )


def _searching(settings: Mapping[str, Any], each: EditLengths, stages: Stages, shape: ModelShape) -> Load:
    """AlphaEdit: text for the null space, and a search for each edit's value on its prompts."""
    chosen = AlphaEdit(**{name: value for name, value in settings["method"].items() if name != "name"})
    prompts = 1 + chosen.prefixes
    length = math.ceil(each.tokens) + chosen.prefix_tokens
    edits = stages.count * stages.edits
    seen = {
        "name": "proj_lora",
        "target_modules": ["down_proj"],
        "basis_sides": "input",
        "calibration_tokens": chosen.calibration_tokens,
    }
    return calibration_load(shape, seen) + Load(
        train_tokens=edits * chosen.value_steps * (prompts + 1) * length,
        logit_positions=edits * chosen.value_steps * (prompts * math.ceil(each.answer) + 1),
        batch_tokens=chosen.edits_at_once * (prompts + 1) * length,
        train=True,
        sequence_length=length,
        adapter_elements=0,
    )
