"""A run's result in the format of PEFT's comparison of methods, field for field; null is what is not known here.

Source of the fields: github.com/huggingface/peft, method_comparison/MetaMathQA, utils.py at 0134244 and, for the newest
of them, results/supertuning--llama-3.2-3B-s974-topk.json at db7d68a.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hiplora.data.prompts import STEP_BY_STEP

if TYPE_CHECKING:
    from hiplora.study.builder import Study
    from hiplora.study.jobs import Job
    from hiplora.study.store import Results

EVERY = 250  # steps between two rows of the benchmark's metrics
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
UNKNOWN = (
    "valid accuracy",
    "train time",
    "eval time",
    "tokens / sec",
    "mem allocated avg",
    "mem reserved avg",
)
PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")


def result_file(
    study: Study, settings: Any, method: str, seed: int, score: Job, results: Results
) -> tuple[str, str] | None:
    """Return a run's file by the benchmark's rules (name, text), None where it is not done.

    The name is METHOD--MODEL-ROW.json; every seed of the study but the first adds its own.
    """
    train = score.needs["adapter"]
    trained, scored = results.get(train), results.get(score)
    if trained is None or scored is None:
        return None
    row, model = study.row(method), study.recipe.model
    model = Path(model).name if Path(model).is_absolute() else model
    kind, origin = row.method.name, results.provenance(train) or {}
    label = f"{kind}/{model.rpartition('/')[2]}-{method.removeprefix(f'{kind}-')}"
    label += "" if seed == study.seeds(settings)[0] else f"-seed{seed}"
    (task,) = study.tasks_of([settings.domain])
    items = scored["tasks"][task]["score"]
    final = {
        "test accuracy": sum(items) / len(items) / 100,
        "forgetting": math.log(scored["drift"][settings.text]["perplexity_ratio"]),
    }
    config = row.method.peft_config(study.recipe.training(row).steps).to_dict()
    spent = [job for job in (train.needs.get("factors"), train, score) if job is not None]
    record = {
        "run_info": {
            "created_at": origin.get("time"),
            "total_time": sum((results.timing(job) or {}).get("seconds") or 0.0 for job in spent),
            "experiment_name": label,
            "peft_branch": None,
            "peft_worktree_is_dirty": None,
            "train_config": {"model_id": model, "seed": seed, **_train_config(study, settings, row, results)},
            "peft_config": {**config, "base_model_name_or_path": model},
            "error_msg": "",
        },
        "train_info": _train_info(study, row, results.timing(train) or {}, trained, final),
        "meta_info": _meta_info(origin),
    }
    return f"{label.replace('/', '--')}.json", json.dumps(record, indent=2, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    """What of a PEFT configuration JSON does not know."""
    if isinstance(value, enum.Enum):
        return value.value
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def _train_config(study: Study, settings: Any, row: Any, results: Results) -> dict[str, Any]:
    train, choice = study.recipe.training(row), study.rate(row)
    rate = study.recipe.given_rate(row)
    if choice is not None:
        rate = (results.get(choice) or {}).get("value", rate)
    asked = study.source(settings.domain).template == "step_by_step"
    return {
        "dtype": DTYPES.get(train.dtype),
        "max_seq_length": train.max_length,
        "batch_size": train.batch_size * train.gradient_accumulation,
        "batch_size_eval": 8,
        "max_steps": train.steps,
        "eval_steps": EVERY,
        "compile": False,
        "use_gc": train.gradient_checkpointing,
        "query_template": STEP_BY_STEP.format(question="{query}") if asked else None,
        "grad_norm_clip": train.max_grad_norm,
        "optimizer_type": "AdamW",
        "optimizer_kwargs": {"lr": rate, "weight_decay": train.weight_decay},
        "lr_scheduler": "cosine" if train.lr_scheduler == "cosine" else None,
        "use_amp": train.dtype in ("bf16", "fp16"),
        "autocast_adapter_dtype": True,
        "generation_kwargs": {"max_new_tokens": 300},
        "attn_implementation": None,
        "init_kv_cache_prefix": None,
    }


def _train_info(
    study: Study, row: Any, timing: Mapping[str, Any], trained: Mapping[str, Any], final: Mapping[str, float]
) -> dict[str, Any]:
    train, curve = study.recipe.training(row), trained["curve"]
    samples, steps = train.batch_size * train.gradient_accumulation, trained["steps"]

    def known(step: int) -> dict[str, Any]:
        return {"step": step, "train loss": _loss(curve, step), "train samples": step * samples}

    rows = [dict.fromkeys((*UNKNOWN, "elapsed time")) | known(step) for step in range(EVERY, steps + 1, EVERY)]
    return {
        # Whole numbers, as the benchmark's own tables want them: 0 without an accelerator.
        "accelerator_memory_reserved_avg": round(timing.get("reserved_bytes_mean") or 0),
        "accelerator_memory_max": round(timing.get("peak_reserved_bytes") or 0),
        "accelerator_memory_reserved_99th": round(timing.get("reserved_bytes_99th") or 0),
        "train_time": timing.get("training_seconds"),
        "file_size": trained.get("adapter_bytes"),
        "num_trainable_params": trained["trainable_parameters"],
        "num_total_params": _total(study, trained["trainable_parameters"]),
        "status": "success",
        "metrics": [*rows, known(steps) | {"train total tokens": trained["tokens"], **final}],
    }


def _total(study: Study, trainable: int) -> int | None:
    """The base model's parameters and the trained ones; None where its configuration is not on this machine."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(study.recipe.model, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        return None
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False).num_parameters() + trainable


def _loss(curve: Sequence[Sequence[float]], step: int) -> float | None:
    """The mean training loss of the `EVERY` steps up to one."""
    losses = [loss for at, loss in curve if step - EVERY < at <= step]
    return sum(losses) / len(losses) if losses else None


def _meta_info(origin: Mapping[str, Any]) -> dict[str, Any]:
    libraries, machine = origin.get("libraries") or {}, origin.get("machine") or {}
    unknown = {"sha": None, "created_at": None}
    packages: dict[str, Any] = {}
    for name in PACKAGES:
        packages |= {f"{name}-version": libraries.get(name), f"{name}-commit-hash": None}
    system = dict.fromkeys(("system", "release", "version", "machine", "processor", "accelerator"))
    return {
        "model_info": unknown,
        "dataset_info": {"metamath": unknown, "gsm8k": unknown},
        "package_info": packages,
        "system_info": system | {name: machine.get(name) for name in ("system", "processor")},
        "pytorch_info": None,
    }
