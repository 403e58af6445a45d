"""Carrying on from a HiP-LoRA adapter without unlearning its task: the directions it depends on are protected too.

The finished adapter becomes part of the weights. Text that the adapted model writes, half of it begun by prompts of the
finished task, shows which directions the model depends on now; united with those protected before, they are the new
basis. A new low-rank part is trained in its complement, and both parts are saved as one adapter of the untouched base.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hiplora.data.encoding import IGNORED, encode_examples
from hiplora.data.examples import load_data
from hiplora.data.texts import ROW_LENGTH
from hiplora.errors import ConfigError, HipLoraError
from hiplora.evaluation.likelihood import can_pad, end_tokens, pad_left, pad_token
from hiplora.files import write_atomic
from hiplora.positions import within_context
from hiplora.training.method import BASIS_FILE, CONFIG_FILE, WEIGHTS_FILE

if TYPE_CHECKING:
    from peft import PeftModel

BATCH_SIZE = 20


def put_on_widened(method: Any, model: Any, tokenizer: Any, folder: Path, *, seed: int, steps: int) -> "PeftModel":
    """Merge the adapter in `folder` into a bare model, and put a new one on it that protects its task too.

    Raises ConfigError if the rows of the finished task cannot be read, or the adapter does not fit the model.
    """
    from peft import PeftModel, get_peft_model

    from hiplora.spectral.activation import united_factors
    from hiplora.tuner import calibrate, frozen_weight
    from hiplora.tuner.experts import unrolled

    adapted: Any = PeftModel.from_pretrained(model, str(folder))
    model, config = adapted.merge_and_unload(), method.peft_config(steps)
    widened = (folder / BASIS_FILE).is_file()
    basis = load_file(folder / BASIS_FILE) if widened else _basis(load_file(folder / WEIGHTS_FILE))
    rows = written_by(model, tokenizer, folder, method.calibration_tokens)
    calibrate(model, config, rows=rows, source="the adapted model, on the finished task and at large")
    with unrolled(model):
        for name, measured in config.calibrated.items():
            weight = frozen_weight(model.get_submodule(name)).float()
            protected = (basis[f"{name}.U"].to(weight), basis[f"{name}.V"].to(weight))
            config.calibrated[name] = united_factors(weight, protected, measured)
    config.principal_rank_pattern = {name: factors.rank for name, factors in config.calibrated.items()}
    torch.manual_seed(seed)
    return get_peft_model(model, config)


def written_by(model: Any, tokenizer: Any, folder: Path, tokens: int) -> list[Tensor]:
    """Return about `tokens` token ids that a model writes: half freely, half begun by a finished task's prompts."""
    from hiplora.training.reading import read_yaml
    from hiplora.training.recipe import TrainRecipe
    from hiplora.tuner import sampled_rows

    try:
        recipe = TrainRecipe.model_validate(read_yaml(folder / "recipe.yaml"))  # its other files may be gone
        data = recipe.data.model_copy(update={"held_out": None})
        examples = load_data(data, chat=bool(tokenizer.chat_template)).train
    except (HipLoraError, ValueError) as error:
        why = f"the rows that {folder} was trained on cannot be read, and their prompts are needed ({error})"
        raise ConfigError(f"train.start_from: {why}; put them back, or set train.widen: false") from error
    length = within_context(recipe.train.max_length, model)
    rows = encode_examples(tokenizer, examples[: max(tokens // ROW_LENGTH, 1)], length, bad=[])[0]
    prompts = []
    for row in rows:
        answer = next((index for index, label in enumerate(row["labels"]) if label != IGNORED), 0)
        prompt = torch.tensor(row["input_ids"][: max(answer, 1)])
        prompts.append(prompt[-within_context(ROW_LENGTH, model) // 2 :])  # leaves as much to write
    written: list[Tensor] = []
    size = BATCH_SIZE if can_pad(model, [len(prompt) for prompt in prompts]) else 1
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        while len(written) < len(prompts) and sum(map(len, written)) < tokens // 2:
            written += _continued(model, tokenizer, prompts[len(written) : len(written) + size])
    return [*written, *sampled_rows(model, max(tokens - sum(map(len, written)), tokens // 2))]


def _continued(model: Any, tokenizer: Any, prompts: list[Tensor]) -> list[Tensor]:
    """Sample what a model writes after prompts, to the end of the text or of the row."""
    ends, pad = end_tokens(model, tokenizer), pad_token(tokenizer)
    ids, mask, _ = pad_left([prompt.tolist() for prompt in prompts], pad)
    width = ids.shape[1]
    written = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), do_sample=True, top_k=0, top_p=1.0,
        temperature=1.0, max_new_tokens=max(within_context(ROW_LENGTH, model) - width, 1), pad_token_id=pad,
        eos_token_id=sorted(ends) or None,
    ).cpu()  # fmt: skip
    rows = []
    for row, prompt in zip(written, prompts, strict=True):
        end = next((i for i, token in enumerate(row.tolist()) if i >= width and token in ends), None)
        rows.append(row[width - len(prompt) : end])
    return rows


def _basis(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the factors of a HiP-LoRA adapter as MODULE.U and MODULE.V."""
    return {
        key.removeprefix("base_model.model.").replace(".hiplora_", "."): tensor
        for key, tensor in tensors.items()
        if key.endswith((".hiplora_U", ".hiplora_V"))
    }


def join_saved(folder: Path, start_from: Path) -> None:
    """Join the adapter just saved in `folder` with the one it carries on from, into a single adapter of the base model.

    Both low-rank parts stay out of the factors of the first adapter, which are saved; the wider basis goes beside them.
    """
    from hiplora.tuner import file_names

    old, new = file_names(load_file(start_from / WEIGHTS_FILE)), load_file(folder / WEIGHTS_FILE)
    config = json.loads((start_from / CONFIG_FILE).read_text(encoding="utf-8"))
    added = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    joined = dict(old)
    for key, tensor in new.items():
        if ".hiplora_A" in key or ".hiplora_B" in key:
            joined[key] = torch.cat([old[key], tensor], dim=0 if ".hiplora_A" in key else 1)
        elif ".hiplora_" not in key:  # modules_to_save, trained on
            joined[key] = tensor
    for field in ("r", "lora_alpha"):
        config[field] += added[field]
    for field in ("rank_pattern", "alpha_pattern"):
        config[field] = {name: value + added[field][name] for name, value in config[field].items()}
    save_file(_basis(new), folder / BASIS_FILE, metadata={"format": "pt"})
    save_file(joined, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    write_atomic(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")
