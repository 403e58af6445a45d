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
        (folder / name).write_text(json.dumps(details.pop(name), indent=1))
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
    (folder / "export.json").write_text(json.dumps(stored, indent=2) + "\n")
    prompt, asked = _how_to_ask(Path(update.source))
    base, (title, code) = hub_name(update.base or "") or "unknown", _CARDS[to]
    if to == "dense":
        (own,) = json.loads((folder / "config.json").read_text())["architectures"]
        kind = "AutoModelForCausalLM" if own.endswith(("ForCausalLM", "LMHeadModel")) else f"transformers.{own}"
        code = code.format(kind=kind)
    code = f"{code}\n{prompt}".strip()
    rank = f" Rank {record['rank']}, scaling 1." if ranks else ""
    serving = _serving(update, base, {*ranks.values()}) if to == "lora" else ""
    compared = "were not compared" if logits[0] is None else f"differ by {logits[0]:.1e} of the largest"
    (folder / "README.md").write_text(f"""---
base_model: {json.dumps(base)}
library_name: {"transformers" if to == "dense" else "peft"}
tags: [lora, hiplora]
---

# {title}

Exported by hiplora from an adapter (`{update.kind}`) of `{base}`.{rank} {dtype}.

```python
{code}
```
{asked}{serving}
Verified on writing: the largest relative difference of a module is {worst:.1e} (`{module}`); logits {compared}.
`export.json` has every module, the origin and the provenance.
""")
    return record


def _serving(update: AdapterUpdate, base: str, ranks: set[int]) -> str:
    """Return what the card of a plain LoRA says about the servers that load it, if any."""
    padded, rank = max(ranks) if len(ranks) == 1 else None, vllm_rank(max(ranks))
    found = server_findings(update, padded) if has_words(update) else [(server, "", "") for server in _SERVING]
    unfit = {server for server, _, remedy in found if not remedy.startswith(_STARTED_WITH)}
    fit = [server for server in _SERVING if server not in unfit]
    commands = "\n".join(_SERVING[server].format(base=base, rank=rank) for server in fit)
    return f"\nWith {' and '.join(fit)}:\n\n```\n{commands}\n```\n" if fit else ""


def has_words(update: AdapterUpdate) -> bool:
    """Whether an adapter's model is a causal language model; of one that is no folder here its task says so."""
    fits = update.config.get("task_type") in (None, "CAUSAL_LM")
    return fits and (not os.path.isdir(resolve(update.base)) or writes_text(update.base))


def _how_to_ask(source: Path) -> tuple[str, str]:
    """Return what the card of a trained adapter says about its prompts: a line of code, and a paragraph."""
    card = source / "README.md"
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines() if card.is_file() else []
    code, asked = (
        next((line for line in lines if line.startswith(start)), "")
        for start in ("inputs = tokenizer", "Ask as it was trained")
    )
    return code, asked and f"\n{asked}\n"


def server_findings(update: AdapterUpdate, pad_rank: int | None = None) -> list[tuple[str, str, str]]:
    """Return what servers reject or misread of an adapter padded to `pad_rank`: (server, problem, remedy) each."""
    ranks = {pad_rank or rank for rank in update.ranks.values()}
    largest = max(ranks)
    allowed = vllm_rank(largest)
    found = []
    experts = any(shared_side(module) for module in update.factors)
    if update.extras or experts:
        why = (
            "experts are adapted, as 3-D parameters: it fails or ignores them"
            if experts
            else "it replaces whole modules"
        )
        found = [(server, why, _DENSE) for server in ("vLLM", "llama.cpp")]
    elif allowed is None:
        found = [("vLLM", f"rank above {VLLM_RANKS[-1]}", _DENSE)]
    elif len(ranks) > 1:
        vllm = "ranks differ between modules and it ignores rank_pattern and alpha_pattern"
        found = [("vLLM", vllm, f"export with --pad-rank {allowed}")]
    elif largest > VLLM_DEFAULT_RANK:
        vllm = f"rank {largest} is above its default max_lora_rank of {VLLM_DEFAULT_RANK}"
        found = [("vLLM", vllm, f"{_STARTED_WITH} --max-lora-rank {allowed}")]
    if len(ranks) > 1 and not experts:
        problem = "ranks differ between modules and it keeps one alpha: other ranks are scaled wrongly, silently"
        found.append(("llama.cpp", problem, f"export with --pad-rank {largest}"))
    base: BaseWeights | None = None
    with suppress(AdapterError):  # not at hand: this says less then
        base = BaseWeights.of(update)
    architectures = (base and base.config.architectures) or []
    multimodal = any("ConditionalGeneration" in name for name in architectures)
    if multimodal and any(name.startswith("model.layers.") for name in update.factors):
        problem = "the checkpoint is multimodal: it looks for model.language_model.* and ignores other names, silently"
        found.append(("vLLM", problem, "export with --prefix model.language_model"))
    if is_transposed(update, base.skeleton if base else None):
        found.append(("llama.cpp", "the base model stores transposed weights (as GPT-2)", _DENSE))
    if base and is_tied(base.skeleton) and any(name.rpartition(".")[2] == "lm_head" for name in update.factors):
        found.append(("llama.cpp", "lm_head is adapted, but tied to the embeddings", _DENSE))
    return found


def vllm_rank(rank: int) -> int | None:
    """Return the smallest `--max-lora-rank` of vLLM's that admits a rank; None where it has none."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def push_to_hub(folder: Path, repository: str) -> None:
    """Upload an adapter or model to a private hub repository; a HiP-LoRA adapter goes as the plain LoRA that it is.

    A result is never lost to the network: what fails is said with the command that does it again.
    """
    from huggingface_hub import HfApi

    from hiplora.adapters.lora import save_as_lora

    config = folder / CONFIG
    own = config.exists() and json.loads(config.read_text(encoding="utf-8")).get("peft_type") == PEFT_TYPE
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "adapter" if own else folder
        if own:
            save_as_lora(folder, source, check_logits=False)
        try:
            api = HfApi()
            api.create_repo(repository, private=True, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=source, ignore_patterns=["checkpoints/*", ".*"])
        except Exception as error:
            problem = first_line(error)
            log.warning("%s: not uploaded (%s); run: hf upload %s %s", repository, problem, repository, folder)


def save_tokenizer(update: AdapterUpdate, folder: Path, base: bool = False) -> None:
    """Write the tokenizer that lies beside an adapter, which may have tokens of its own; else the `base` model's.

    Of a base model for pictures or sound, what prepares these comes along.
    """
    beside = (Path(update.source) / "tokenizer_config.json").is_file()
    found: list[tuple[Any, str]] = [(AutoTokenizer, update.source)] if beside else []
    if base:
        name = resolve(update.base)
        found = found or [(AutoTokenizer, name)]
        if any(Path(name).glob("*processor_config.json")):
            found.insert(0, (AutoProcessor, name))
    for kind, source in found:
        with suppress(Exception):  # what transformers raises where a model has none of it: the folder has none then
            made = kind.from_pretrained(source, trust_remote_code=False)
            tokenizer = made if kind is AutoTokenizer else getattr(made, "tokenizer", None)
            if tokenizer is None or knows_text(tokenizer):
                made.save_pretrained(folder)
