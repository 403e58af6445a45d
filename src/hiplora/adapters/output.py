"""An exported folder: its record (`export.json`), its model card, and what servers reject or misread in it."""

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, AutoTokenizer

from hiplora.adapters.base import BaseWeights, is_tied, is_transposed
from hiplora.adapters.folder import CONFIG
from hiplora.adapters.update import AdapterUpdate
from hiplora.errors import AdapterError, first_line
from hiplora.models import hub_name, knows_text, resolve, writes_text
from hiplora.provenance import provenance
from hiplora.tuner.config import PEFT_TYPE
from hiplora.tuner.experts import shared_side

log = logging.getLogger(__name__)

# vLLM 0.26; what is said of llama.cpp is of its converter b9496.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT_RANK = 16
_DENSE = "export with --to dense"
_PEFT = 'model = peft.PeftModel.from_pretrained(base_model, "path/to/this/folder")'
# What was written → the card's title and the code that loads it.
_CARDS = {
    "lora": ("Plain LoRA adapter", _PEFT),
    "hiplora": ("HiP-LoRA adapter", f"import hiplora\n{_PEFT}"),
    "dense": ("Standalone model", 'model = {kind}.from_pretrained("path/to/this/folder", dtype="auto")'),
}

# Server → how it serves a plain LoRA.
_SERVING = {
    "vLLM": "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules tuned=path/to/this/folder",
    "llama.cpp": "python convert_lora_to_gguf.py path/to/this/folder --base {base} --outfile tuned.gguf\n"
    "llama-server -m base.gguf --lora tuned.gguf",
}
_STARTED_WITH = "start it with"  # a remedy that is in the commands


def write_record(
    to: str,
    update: AdapterUpdate,
    folder: Path,
    path: Any,
    differences: Mapping[str, float],
    logits: tuple[float | None, str],
    dtype: str = "float32",
    ranks: Mapping[str, int] | None = None,
    details: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `export.json` and the model card into `folder`, which will be at `path`, and return the record.

    `to` is "lora", "hiplora" or "dense"; `differences` is relative (Frobenius), per module, `logits` the largest
    difference of a logit in units of the largest, or None and why it is not known. `details` are more fields of the
    record; one that is named like a file is written as one.
    """
    ranks, details = ranks or {}, dict(details or {})
    for name in [name for name in details if name.endswith(".json")]:
        (folder / name).write_text(json.dumps(details.pop(name), indent=1), encoding="utf-8")
    module, worst = max(differences.items(), key=lambda item: item[1])
    record = {
        "schema": 1,
        "kind": "export",
        "to": to,
        "path": str(path),
        "base": update.base,
        "dtype": dtype,
        "rank": max(ranks.values(), default=None),
        "largest_difference": {"module": module, "relative": worst},
        "logit_difference": logits[0],
        "note": logits[1],
        "modules": [
            {"module": name, "rank": ranks.get(name), "difference": value} for name, value in differences.items()
        ],
        "source": update.source,
        "method": update.kind,
        **details,
    }
    stored = record | {"provenance": provenance()}
    (folder / "export.json").write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
    prompt_code, prompt_note = _how_to_ask(Path(update.source))
    base, (title, code) = hub_name(update.base or "") or "unknown", _CARDS[to]
    if to == "dense":
        (architecture,) = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
        is_causal = architecture.endswith(("ForCausalLM", "LMHeadModel"))
        code = code.format(kind="AutoModelForCausalLM" if is_causal else f"transformers.{architecture}")
    code = f"{code}\n{prompt_code}".strip()
    rank = f" Rank {record['rank']}, scaling 1." if ranks else ""
    serving = _serving(update, base, {*ranks.values()}) if to == "lora" else ""
    compared = "were not compared" if logits[0] is None else f"differ by {logits[0]:.1e} of the largest"
    card = f"""---
base_model: {json.dumps(base)}
library_name: {"transformers" if to == "dense" else "peft"}
tags: [lora, hiplora]
---

# {title}

Exported by hiplora from an adapter (`{update.kind}`) of `{base}`.{rank} {dtype}.

```python
{code}
```
{prompt_note}{serving}
Verified on writing: the largest relative difference of a module is {worst:.1e} (`{module}`); logits {compared}.
`export.json` has every module, the origin and the provenance.
"""
    (folder / "README.md").write_text(card, encoding="utf-8")
    return record


def _serving(update: AdapterUpdate, base: str, ranks: set[int]) -> str:
    """Return what the card of a plain LoRA says about the servers that load it, if any."""
    if not has_words(update):
        return ""
    padded, rank = max(ranks) if len(ranks) == 1 else None, vllm_rank(max(ranks))
    findings = server_findings(update, padded)
    unfit = {server for server, _, remedy in findings if not remedy.startswith(_STARTED_WITH)}
    fit = [server for server in _SERVING if server not in unfit]
    commands = "\n".join(_SERVING[server].format(base=base, rank=rank) for server in fit)
    return f"\nWith {' and '.join(fit)}:\n\n```\n{commands}\n```\n" if fit else ""


def has_words(update: AdapterUpdate) -> bool:
    """Whether an adapter's model is a causal language model; where it is not a local folder, its task decides."""
    is_causal = update.config.get("task_type") in (None, "CAUSAL_LM")
    return is_causal and (not os.path.isdir(resolve(update.base)) or writes_text(update.base))


def _how_to_ask(source: Path) -> tuple[str, str]:
    """Return what the card of a trained adapter says about its prompts: a line of code, and a paragraph."""
    card = source / "README.md"
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines() if card.is_file() else []
    code, note = (
        next((line for line in lines if line.startswith(start)), "")
        for start in ("inputs = tokenizer", "Ask as it was trained")
    )
    return code, note and f"\n{note}\n"


def server_findings(update: AdapterUpdate, pad_rank: int | None = None) -> list[tuple[str, str, str]]:
    """Return what servers reject or misread of an adapter padded to `pad_rank`: (server, problem, remedy) each."""
    ranks = {pad_rank or rank for rank in update.ranks.values()}
    largest = max(ranks)
    allowed = vllm_rank(largest)
    findings = []
    experts = any(shared_side(module) for module in update.factors)
    if update.extras or experts:
        problem = "it replaces whole modules"
        if experts:
            problem = "experts are adapted, as 3-D parameters: it fails or ignores them"
        findings = [(server, problem, _DENSE) for server in _SERVING]
    elif allowed is None:
        findings = [("vLLM", f"rank above {VLLM_RANKS[-1]}", _DENSE)]
    elif len(ranks) > 1:
        problem = "ranks differ between modules and it ignores rank_pattern and alpha_pattern"
        findings = [("vLLM", problem, f"export with --pad-rank {allowed}")]
    elif largest > VLLM_DEFAULT_RANK:
        problem = f"rank {largest} is above its default max_lora_rank of {VLLM_DEFAULT_RANK}"
        findings = [("vLLM", problem, f"{_STARTED_WITH} --max-lora-rank {allowed}")]
    if len(ranks) > 1 and not experts:
        problem = "ranks differ between modules and it keeps one alpha: other ranks are scaled wrongly, silently"
        findings.append(("llama.cpp", problem, f"export with --pad-rank {largest}"))
    base: BaseWeights | None = None
    with suppress(AdapterError):  # not available: the checks below that need it are left out
        base = BaseWeights.of(update)
    architectures = (base and base.config.architectures) or []
    multimodal = any("ConditionalGeneration" in name for name in architectures)
    if multimodal and any(name.startswith("model.layers.") for name in update.factors):
        problem = "the checkpoint is multimodal: it looks for model.language_model.* and ignores other names, silently"
        findings.append(("vLLM", problem, "export with --prefix model.language_model"))
    if is_transposed(update, base.skeleton if base else None):
        findings.append(("llama.cpp", "the base model stores transposed weights (as GPT-2)", _DENSE))
    if base and is_tied(base.skeleton) and any(name.rpartition(".")[2] == "lm_head" for name in update.factors):
        findings.append(("llama.cpp", "lm_head is adapted, but tied to the embeddings", _DENSE))
    return findings


def vllm_rank(rank: int) -> int | None:
    """Return vLLM's smallest `--max-lora-rank` that admits a rank; None if the rank is too large."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def push_to_hub(folder: Path, repository: str) -> None:
    """Upload an adapter or model to a private hub repository; a HiP-LoRA adapter goes as the plain LoRA that it is.

    A failed upload is a warning with the commands that repeat it: the result itself is not lost.
    """
    from huggingface_hub import HfApi

    from hiplora.adapters.lora import save_as_lora

    config = folder / CONFIG
    is_hiplora = config.exists() and json.loads(config.read_text(encoding="utf-8")).get("peft_type") == PEFT_TYPE
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "adapter" if is_hiplora else folder
        if is_hiplora:
            save_as_lora(folder, source, check_logits=False)
        try:
            api = HfApi()
            api.create_repo(repository, private=True, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=source, ignore_patterns=["checkpoints/*", ".*"])
        except Exception as error:
            command = f"hf upload {repository} {folder} --private --exclude 'checkpoints/*'"
            if is_hiplora:
                plain = f"{folder}-lora"
                command = (
                    f"hiplora export {folder} --to lora --out {plain} && hf upload {repository} {plain} --private"
                )
            log.warning("%s: not uploaded (%s); run: %s", repository, first_line(error), command)


def save_tokenizer(update: AdapterUpdate, folder: Path, base: bool = False) -> None:
    """Write the tokenizer beside an adapter, which may have tokens of its own; else, with `base`, the base model's.

    The processor of a base model for pictures or sound is written too.
    """
    has_own = (Path(update.source) / "tokenizer_config.json").is_file()
    sources: list[tuple[Any, str]] = [(AutoTokenizer, update.source)] if has_own else []
    if base:
        name = resolve(update.base)
        sources = sources or [(AutoTokenizer, name)]
        if any(Path(name).glob("*processor_config.json")):
            sources.insert(0, (AutoProcessor, name))
    for kind, source in sources:
        with suppress(Exception):  # whatever transformers raises for a model without one
            loaded = kind.from_pretrained(source, trust_remote_code=False)
            tokenizer = loaded if kind is AutoTokenizer else getattr(loaded, "tokenizer", None)
            if tokenizer is None or knows_text(tokenizer):
                loaded.save_pretrained(folder)
