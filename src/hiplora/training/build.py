"""Put a trainer together from a recipe, a model and encoded rows."""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig
from trl.data_utils import pack_dataset

from hiplora.errors import ConfigError, HipLoraError
from hiplora.recipes import TrainRecipe, TrainSettings
from hiplora.recipes.adalora import Schedule
from hiplora.recipes.methods import AdaLoraMethod, Spectral, SplitLoraMethod
from hiplora.training.adalora import AdaLoraTrainer
from hiplora.training.adapters import adapter_config
from hiplora.training.attention import use_packed_attention
from hiplora.training.calibration import calibrate_for
from hiplora.training.kl import kl_penalty
from hiplora.training.metrics import Record
from hiplora.training.moved_starts import PutOn, prepare_start, without_own_start
from hiplora.training.run import RunFolder
from hiplora.training.split import SplitTrainer, batches_in_epoch
from hiplora.training.start import Start
from hiplora.training.trainer import RecordingTrainer
from hiplora.tuner import HipLoraConfig
from hiplora.tuner.targets import survey

Rows = Sequence[dict[str, list[int]]]
SCHEDULERS = {"constant": "constant_with_warmup", "cosine": "cosine"}  # recipes' names → transformers'


def sequences(rows: Rows, settings: TrainSettings) -> Dataset:
    """Make a data set of the rows, packed into sequences of `max_length` if the recipe says so."""
    data = Dataset.from_list(list(rows))
    return pack_dataset(data, settings.max_length, "bfd") if settings.packing else data


def total_steps(settings: TrainSettings, count: int, clients: int = 1) -> int:
    """Return how many optimizer steps a run over `count` sequences has.

    Raises:
        ConfigError: there are fewer sequences than clients to share them.
    """
    if settings.steps is not None:
        return settings.steps
    batches = batches_in_epoch(count, settings.batch_size, clients)
    return math.ceil((settings.epochs or 1) * math.ceil(batches / settings.gradient_accumulation))


def build_trainer(
    recipe: TrainRecipe,
    run: RunFolder,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_set: Dataset,
    held_out: Dataset | None,
    record: Record,
    steps: int,
    start: Start | None = None,
) -> RecordingTrainer:
    """Put the adapter on the model and a trainer around both; sets the seed.

    Of `start`, the adapter that is carried on from, only the configuration is used here. A method that moves the
    base is brought to its start, unless that is known: from a checkpoint's run or from `start`.

    Raises:
        ConfigError: the method's settings do not fit the model.
    """
    if start is not None:
        config = start.configured(recipe.method)
    else:
        config = adapter_config(recipe.method, _schedule(recipe, steps))
    if start is None and isinstance(config, HipLoraConfig) and config.basis == "activation":
        _calibrate(recipe, config, model, tokenizer)  # before the model is made to take flattened rows only
    known = start is not None or run.last_checkpoint is not None
    put_start = _prepare(recipe, config, model, tokenizer, known)
    penalty = kl_penalty(recipe, model, tokenizer)  # so is this text sampled
    arguments = _arguments(recipe, run.checkpoints, steps, flat=_flatten(model, recipe.train))
    set_seed(recipe.seed)  # the adapter's start is drawn below; not every version of TRL does this itself
    try:
        trainer = _kind(recipe, start)(
            model=model,
            args=arguments,
            train_dataset=train_set,
            eval_dataset=held_out,
            processing_class=tokenizer,
            peft_config=config,
            record=record,
            checkpoints=run.checkpoints,
            keep_checkpoints=recipe.train.keep_checkpoints,
            eval_every=recipe.train.eval_every,
            penalties=[penalty] if penalty else [],
        )
    except HipLoraError:
        raise
    except ValueError as error:
        raise _unfit(recipe, error) from error
    put_start(trainer.adapted)
    return trainer


def _schedule(recipe: TrainRecipe, steps: int) -> Schedule | None:
    if not isinstance(recipe.method, AdaLoraMethod):
        return None
    try:
        return recipe.method.schedule(steps)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _kind(recipe: TrainRecipe, start: Start | None) -> Callable[..., RecordingTrainer]:
    if isinstance(recipe.method, AdaLoraMethod):
        return functools.partial(AdaLoraTrainer, prunes=start is None)
    if isinstance(recipe.method, SplitLoraMethod):
        return functools.partial(SplitTrainer, split=recipe.method)
    return RecordingTrainer


def _unfit(recipe: TrainRecipe, error: Exception) -> ConfigError:
    return ConfigError(
        f"method {recipe.method.name} does not fit {recipe.model}: {error}; check method.target_modules and "
        "the patterns against the model's module names"
    )


def _calibrate(
    recipe: TrainRecipe, config: HipLoraConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    method = recipe.method
    assert isinstance(method, Spectral)
    try:
        survey(model, config)
    except ConfigError as error:
        raise _unfit(recipe, error) from error
    calibrate_for(method, config, model, tokenizer)


def _prepare(
    recipe: TrainRecipe,
    config: PeftConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    known: bool,
) -> PutOn:
    """Return what brings the adapted model to its start, if its method moves the base and the start is not known."""
    if not isinstance(config, LoraConfig) or not recipe.method.moves_base:
        return lambda adapted: None
    if known:
        without_own_start(config)
        return lambda adapted: None
    try:
        return prepare_start(recipe.method, config, model, tokenizer)
    except ConfigError as error:
        raise _unfit(recipe, error) from error
    except HipLoraError:
        raise
    except ValueError as error:
        raise _unfit(recipe, error) from error


def _flatten(model: PreTrainedModel, settings: TrainSettings) -> bool:
    """Whether batches are one flattened row. Packing needs it; on a CPU it also saves the padding."""
    if model.device.type == "cpu" and use_packed_attention(model, settings.max_length):
        return True
    return settings.packing


def _arguments(recipe: TrainRecipe, folder: Path, steps: int, flat: bool) -> SFTConfig:
    settings = recipe.train
    arguments = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        max_steps=steps,
        learning_rate=settings.lr,
        lr_scheduler_type=SCHEDULERS[settings.lr_scheduler],
        warmup_steps=math.ceil(settings.warmup_ratio * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch",
        use_cpu=not torch.cuda.is_available(),
        bf16=settings.dtype == "bf16",
        fp16=settings.dtype == "fp16",
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        seed=recipe.seed,
        # The rows come tokenised, cut and packed; here the flag only chooses the collator that flattens.
        packing=flat,
        max_length=settings.max_length,
        dataset_kwargs={"skip_prepare_dataset": True},
        save_strategy="steps",
        save_steps=settings.save_every,
        logging_strategy="no",  # the record does that
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process uses one GPU; the Trainer would wrap the model in DataParallel
    return arguments
