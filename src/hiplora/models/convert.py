"""From a quantised GGUF file to a plain fp32 model folder that every tool loads."""

import contextlib
import io
from pathlib import Path
from typing import Any

from hiplora.models.known import PackagedModel
from hiplora.models.quiet import quiet_transformers


def convert_gguf(gguf: Path, folder: Path, model: PackagedModel) -> None:
    """Write the model of a GGUF file to `folder`: fp32 safetensors, config, tokenizer with its chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    # The GGUF reader's progress bar has no switch; logging keeps its own handle on standard error.
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(**source, model_max_length=model.context_length)
        network: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # transformers goes on taking the model for a quantised one; its weights are plain tensors by now.
        del network.config.quantization_config
        network.is_quantized = False
        network.hf_quantizer = None
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(_card(gguf, model), encoding="utf-8")


def _card(gguf: Path, model: PackagedModel) -> str:
    return (
        f"# {model.title}, in fp32\n\n"
        f"Made by hiplora from `{gguf.name}` (sha256 `{model.gguf_sha256}`) of the Python package "
        f"{model.package} {model.version}. The weights are the 4-bit file's values, written out in fp32: they "
        f"are close to, not equal to, the originally published ones.\n\nLicence: {model.licence}.\n"
    )
