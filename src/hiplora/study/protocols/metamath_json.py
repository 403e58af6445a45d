"""A run's result in the format of PEFT's comparison of methods, field for field; null is what is not known here.

Source of the fields: github.com/huggingface/peft, method_comparison/MetaMathQA, utils.py at 0134244 and, for the newest
of them, results/supertuning--llama-3.2-3B-s974-topk.json at db7d68a.
"""

import enum
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hiplora.data.prompts import STEP_BY_STEP
from hiplora.errors import ConfigError
from hiplora.models.shapes import model_shape
from hiplora.recipes.protocols import MetaMath
from hiplora.study.builder import Study
from hiplora.study.protocols.metamath_rows import Run
from hiplora.study.results import Results
from hiplora.training.recipe import TrainSettings

EVERY = 250  # steps between two rows of the benchmark's metrics
NEW_TOKENS = 300
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
ROW = (
    *("step", "valid accuracy", "train loss", "train samples", "train time", "eval time", "tokens / sec"),
    *("mem allocated avg", "mem reserved avg", "elapsed time"),
)


def result_file(study: Study, settings: MetaMath, run: Run, results: Results) -> tuple[str, str] | None:
    """Return a run's file by the benchmark's rules (name, text), None where it is not done.

    The name is METHOD--MODEL-ROW.json; every seed of the study but the first adds its own.
    """
    trained, scored = results.get(run.train), results.get(run.score)
    if trained is None or scored is None:
        return None
    name = experiment(study, run.method)
    seeds = study.seeds(settings)
    label = name if run.seed == seeds[0] else f"{name}-seed{run.seed}"
    (task,) = study.tasks_of([settings.domain])
    final = {
        "test accuracy": sum(scored["tasks"][task]["score"]) / len(scored["tasks"][task]["score"]) / 100,
        "forgetting": math.log(scored["drift"][settings.text]["perplexity_ratio"]),
    }
    record = {
        "run_info": _run_info(study, settings, run, results, label),
        "train_info": _train_info(study, run, results, trained, final),
        "meta_info": _meta_info(results.provenance(run.train) or {}),
    }
    return f"{label.replace('/', '--')}.json", json.dumps(record, indent=2) + "\n"


def experiment(study: Study, method: str) -> str:
    """Return the name of a method's experiment: METHOD/MODEL-ROW, as the benchmark's folders are called."""
    kind = study.row(method).method.name
    row = method.removeprefix(f"{kind}-")
    return f"{kind}/{_model(study).rpartition('/')[2]}-{row}"


def _model(study: Study) -> str:
    """The model's name; of a folder on this machine only its last part."""
    name = study.recipe.model
    return Path(name).name if Path(name).is_absolute() else name


def _run_info(study: Study, settings: MetaMath, run: Run, results: Results, label: str) -> dict[str, Any]:
    jobs = [run.train.needs.get("factors"), run.train, run.score]
    timings = [results.timing(job) or {} for job in jobs if job is not None]
    return {
        "created_at": (results.provenance(run.train) or {}).get("time"),
        "total_time": sum(timing.get("seconds") or 0.0 for timing in timings),
        "experiment_name": label,
        "peft_branch": None,
        "peft_worktree_is_dirty": None,
        "train_config": _train_config(study, settings, run, results),
        "peft_config": _peft_config(study, run),
        "error_msg": "",
    }


def _train_config(study: Study, settings: MetaMath, run: Run, results: Results) -> dict[str, Any]:
    from hiplora.study.steps.evaluate import BATCH

    row = study.row(run.method)
    train = study.recipe.training(row)
    choice = study.rate(row)
    rate = study.recipe.given_rate(row)
    if choice is not None:
        rate = (results.get(choice) or {}).get("value", rate)
    asked = study.source(settings.domain).template == "step_by_step"
    return {
        "model_id": _model(study),
        "dtype": DTYPES.get(train.dtype),
        "max_seq_length": train.max_length,
        "batch_size": train.batch_size * train.gradient_accumulation,
        "batch_size_eval": BATCH,
        "max_steps": train.steps,
        "eval_steps": EVERY,
        "compile": False,
        "use_gc": train.gradient_checkpointing,
        "query_template": STEP_BY_STEP.format(question="{query}") if asked else None,
        "seed": run.seed,
        "grad_norm_clip": train.max_grad_norm,
        "optimizer_type": "AdamW",
        "optimizer_kwargs": {"lr": rate, "weight_decay": train.weight_decay},
        "lr_scheduler": "cosine" if train.lr_scheduler == "cosine" else None,
        "use_amp": train.dtype in ("bf16", "fp16"),
        "autocast_adapter_dtype": True,
        "generation_kwargs": {"max_new_tokens": NEW_TOKENS},
        "attn_implementation": None,
        "init_kv_cache_prefix": None,
    }


def _peft_config(study: Study, run: Run) -> dict[str, Any]:
    row = study.row(run.method)
    steps = study.recipe.training(row).steps
    config = {**row.method.peft_config(steps).to_dict(), "base_model_name_or_path": _model(study)}
    return {key: _plain(value) for key, value in config.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def _train_info(
    study: Study, run: Run, results: Results, trained: Mapping[str, Any], final: Mapping[str, float]
) -> dict[str, Any]:
    timing, train = results.timing(run.train) or {}, study.recipe.training(study.row(run.method))
    count = trained["trainable_parameters"]
    return {
        # Whole numbers, as the benchmark's own tables want them: 0 without an accelerator.
        "accelerator_memory_reserved_avg": round(timing.get("reserved_bytes_mean") or 0),
        "accelerator_memory_max": round(timing.get("peak_reserved_bytes") or 0),
        "accelerator_memory_reserved_99th": round(timing.get("reserved_bytes_99th") or 0),
        "train_time": timing.get("training_seconds"),
        "file_size": trained.get("adapter_bytes"),
        "num_trainable_params": count,
        "num_total_params": _total(study, count),
        "status": "success",
        "metrics": _metrics(trained, train, final),
    }


def _total(study: Study, trainable: int) -> int | None:
    try:
        return model_shape(study.recipe.model).parameters + trainable
    except ConfigError:
        return None


def _metrics(
    trained: Mapping[str, Any], train: TrainSettings, final: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Rows of so many steps each, and the last one with what was measured in the end."""
    samples, steps = train.batch_size * train.gradient_accumulation, trained["steps"]
    rows = []
    for step in range(EVERY, steps + 1, EVERY):
        known = {"step": step, "train loss": _loss(trained["curve"], step), "train samples": step * samples}
        rows.append({**dict.fromkeys(ROW), **known})
    last = {
        "step": steps,
        "test accuracy": final["test accuracy"],
        "train loss": _loss(trained["curve"], steps),
        "train samples": steps * samples,
        "train total tokens": trained["tokens"],
        "forgetting": final["forgetting"],
    }
    return [*rows, last]


def _loss(curve: Sequence[Sequence[float]], step: int) -> float | None:
    """The mean training loss of the `EVERY` steps up to one."""
    losses = [loss for at, loss in curve if step - EVERY < at <= step]
    return sum(losses) / len(losses) if losses else None


def _meta_info(origin: Mapping[str, Any]) -> dict[str, Any]:
    libraries, machine = origin.get("libraries") or {}, origin.get("machine") or {}
    unknown = {"sha": None, "created_at": None}
    packages: dict[str, Any] = {}
    for name in ("transformers", "peft", "datasets", "bitsandbytes", "torch"):
        packages |= {f"{name}-version": libraries.get(name), f"{name}-commit-hash": None}
    return {
        "model_info": dict(unknown),
        "dataset_info": {"metamath": dict(unknown), "gsm8k": dict(unknown)},
        "package_info": packages,
        "system_info": {
            "system": machine.get("system"),
            "release": None,
            "version": None,
            "machine": None,
            "processor": machine.get("processor"),
            "accelerator": None,
        },
        "pytorch_info": None,
    }
