"""What a job will do, told from its settings and the model's shape before anything is loaded: a function a kind.

Rows and edits are counted in files that are there (`measured`), other lengths are those of `lengths`; what a model
writes is counted to the limit of its task, which it may stop short of.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hiplora.errors import ConfigError
from hiplora.evaluation.suite import most_written
from hiplora.models.shapes import FACTORED, ModelShape
from hiplora.study.engine.jobs import Job, is_result
from hiplora.study.estimate import Load, adapter_elements, calibration_load, full_settings, svd_load
from hiplora.study.estimate.factoring import SAMPLED_AT_ONCE, truncated_flops
from hiplora.study.steps.edit_load import edit_load
from hiplora.study.steps.lengths import OTHER_TASK, TASKS
from hiplora.study.steps.measured import DataLengths, data_of, edits_at, items_of
from hiplora.training.baselines.split_lora import check_cut
from hiplora.training.recipe import TrainSettings
from hiplora.tuner import ROW_LENGTH

Settings = Mapping[str, Any]
BATCH = 8  # texts that are scored, and written, at a time
DRIFT_READS = 2  # of a text: by the adapted model, and by the base, which is compared and found back
BYTES = 4  # of a number that is saved


def train(settings: Settings, shape: ModelShape, data: Path | None = None) -> Load:
    """Steps of full sequences, held-out rows before and after, the adapter with its last checkpoint on the disk."""
    recipe = settings["recipe"]
    method, trained = full_settings(known(recipe.get("method", {}))), _train_settings(recipe)
    rows = data_of(recipe["data"], data)
    steps = _steps(rows, trained)
    learned = training_load(recipe, shape, steps, rows)
    numbers = shape.trainable(method)
    saved = numbers * (2 if method["name"] == "pissa" else 1)
    if method["name"] in FACTORED and method["save_factors"]:
        saved += shape.factor_scalars(method)
    checkpoint = numbers + 2 * numbers  # with the optimizer's two moments
    often = 2 if trained.eval_every is None else 2 + steps // trained.eval_every
    held_out = int(often * rows.held_out * min(rows.tokens, trained.max_length))
    return learned + Load(forward_tokens=held_out, disk_bytes=BYTES * (saved + checkpoint))


def speed(settings: Settings, shape: ModelShape, data: Path | None = None) -> Load:
    """The warm-up and the measured steps."""
    rows = data_of(settings["recipe"]["data"], data)
    return training_load(settings["recipe"], shape, settings["warmup"] + settings["steps"], rows)


def evaluate(settings: Settings, shape: ModelShape, data: Path | None = None) -> Load:
    """Every item of the tasks, and the texts of the drift."""
    return score_load(settings["tasks"], data) + drift_load(settings["drift"])


def collect(settings: Settings, shape: ModelShape, data: Path | None = None) -> Load:
    """Nothing to speak of."""
    return Load()


def factorize(settings: Settings, shape: ModelShape, data: Path | None = None) -> Load:
    """Decompositions, and for the activation basis the text that they are measured on."""
    method = full_settings(known(settings["method"]))
    return calibration_load(shape, method) + Load(disk_bytes=BYTES * shape.factor_scalars(method))


def inspect(settings: Settings, shape: ModelShape, data: Path | None = None) -> Load:
    """The leading directions of every linear layer: the most that an adapter may sit on, and that may be new."""
    ranks = {name: min(settings["rank"], *size) for name, size in shape.modules.items() if name != shape.head}
    return Load(svd_flops=sum(truncated_flops(*shape.modules[name], k) for name, k in ranks.items()))


def edit(settings: Settings, shape: ModelShape, data: Path | None = None) -> Load:
    """Edits taught and asked for, stage by stage, and the drift of the last one."""
    method = known(settings["method"])
    each = edits_at(settings["edits"], data, settings.get("limit"), settings.get("category"))
    return edit_load({**settings, "method": method}, shape, each) + drift_load(settings.get("drift"))


def probe(settings: Settings, shape: ModelShape, data: Path | None = None) -> Load:
    """All of each module's directions, and the texts and tasks under every intervention."""
    from hiplora.probing.interventions import layer_of
    from hiplora.probing.run import CALIBRATION_TOKENS, ProbeSettings
    from hiplora.study.steps.probe import NOT_OF_THE_PROBE

    asked = ProbeSettings(
        model="", **{name: value for name, value in settings.items() if name not in NOT_OF_THE_PROBE}
    )
    method: dict[str, Any] = {
        "name": "proj_lora",
        "preset": "paper",
        **({} if asked.modules is None else {"target_modules": asked.modules}),
    }
    modules, layers = shape.targets(full_settings(method)), _probed_layers(asked.layers, shape.layers)
    if layers is not None:
        method["layers_to_transform"] = layers
        modules = {name: size for name, size in modules.items() if layer_of(name) in layers}
    count = asked.count(len(modules))
    texts = {"texts": settings["texts"], "tokens": asked.tokens, "window": asked.tokens}
    found = drift_load(texts).times(count) + score_load(settings.get("scores") or {}, data).times(count + 1)
    if asked.basis == "activation":
        measured = {"basis": "activation", "basis_sides": "input", "calibration_tokens": CALIBRATION_TOKENS}
        return found + calibration_load(shape, {**method, **measured})
    return found + Load(svd_flops=sum(truncated_flops(m, n, min(m, n)) for m, n in modules.values()))


LOADS: Mapping[str, Callable[[Settings, ModelShape, Path | None], Load]] = {
    "train": train,
    "evaluate": evaluate,
    "merge": evaluate,
    "collect": collect,
    "factorize": factorize,
    "inspect": inspect,
    "edit": edit,
    "probe": probe,
    "speed": speed,
}


def load_of(job: Job, shape: ModelShape, data: Path | None) -> Load:
    """Return what a job will do, with the study's files in the folder `data`.

    Raises:
        DataError: one of them cannot be used.
        ConfigError: the job's settings do not fit the model; it is named.
    """
    try:
        return LOADS[job.kind](job.settings, shape, data)
    except ConfigError as error:
        raise ConfigError(f"{job.name}: {error}") from error


def known(method: Settings) -> dict[str, Any]:
    """Return a method's settings without those that another job has yet to find; they take their defaults."""
    return {name: value for name, value in method.items() if not is_result(value)}


def training_load(recipe: Settings, shape: ModelShape, steps: int, row: DataLengths) -> Load:
    """Return the load of so many training steps, which read factors from the cache and leave nothing."""
    method, trained = full_settings(known(recipe.get("method", {}))), _train_settings(recipe)
    check_cut(method.get("cut_layer", 0), shape.layers)
    length = trained.max_length if trained.packing else min(trained.max_length, math.ceil(row.tokens))
    tokens = steps * trained.batch_size * trained.gradient_accumulation * length
    return _kl_load(trained, steps) + Load(
        train_tokens=tokens,
        logit_positions=int(tokens * row.learned),
        svd_flops=svd_load(shape, method) if method["name"] in ("pissa", "osf") else 0.0,
        batch_tokens=trained.batch_size * length,
        train=True,
        sequence_length=min(trained.max_length, math.ceil(row.tokens)),  # rows do not attend to each other
        factor_scalars=shape.factor_scalars(method),
        adapter_elements=adapter_elements(shape, method),
        checkpointing=trained.gradient_checkpointing,
    )


def _kl_load(trained: TrainSettings, steps: int) -> Load:
    """Other text, read by the base and by the adapted model in every step; sampled before, where none is named."""
    if not trained.kl_weight:
        return Load()
    read = steps * trained.kl_tokens
    return Load(
        train_tokens=read,
        forward_tokens=read,
        logit_positions=2 * read,
        generated_tokens=trained.kl_pool if trained.kl_text is None else 0,
        batch_tokens=trained.kl_tokens,
        train=True,
        sequence_length=min(ROW_LENGTH, trained.kl_tokens),
        decode_batch=SAMPLED_AT_ONCE,
    )


def score_load(tasks: Mapping[str, int | None], data: Path | None) -> Load:
    """Return the load of scoring tasks, each with its number of items (None: all)."""
    found = Load()
    for task, items in tasks.items():
        each = TASKS.get(task, OTHER_TASK)
        count = items or items_of(task, data) or each.rows
        written, samples = most_written(task)
        found += Load(
            forward_tokens=int(count * (each.read + samples * each.prompt)),
            generated_tokens=count * written * samples,
            logit_positions=int(count * each.scored),
            batch_tokens=BATCH * math.ceil(each.read),
            sequence_length=math.ceil(max(each.read, each.prompt + written)),
            decode_batch=BATCH,
        )
    return found


def drift_load(drift: Settings | None) -> Load:
    """Return the load of measuring the drift on texts, each position of them scored."""
    if not drift:
        return Load()
    documents = drift.get("documents")
    each = drift["tokens"] if documents is None else documents * drift["window"]
    tokens = DRIFT_READS * len(drift["texts"]) * each
    window = min(drift["window"], each)
    return Load(forward_tokens=tokens, logit_positions=tokens, batch_tokens=window, sequence_length=window)


def _train_settings(recipe: Settings) -> TrainSettings:
    fields = TrainSettings.model_fields
    written = known(recipe.get("train", {}))
    return TrainSettings.model_validate({name: value for name, value in written.items() if name in fields})


def _steps(rows: DataLengths, trained: TrainSettings) -> int:
    if trained.steps is not None:
        return trained.steps
    sequences = rows.rows * min(rows.tokens / trained.max_length, 1.0) if trained.packing else rows.rows
    batches = math.ceil(sequences / trained.batch_size)
    return math.ceil((trained.epochs or 1) * math.ceil(batches / trained.gradient_accumulation))


def _probed_layers(layers: Any, count: int) -> list[int] | None:
    """The layers that a probe looks at; None is all."""
    if layers is None:
        return sorted({0, (count - 1) // 2, count - 1})
    return list(layers) or None
