"""What can be found wrong with a model and data before the model's weights are loaded."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hiplora.errors import ConfigError, first_line
from hiplora.evaluation.drift import cut_windows
from hiplora.evaluation.likelihood import Encoded
from hiplora.evaluation.texts import overlap
from hiplora.models import resolve
from hiplora.models.quiet import quiet_transformers
from hiplora.study.data import SplitData
from hiplora.study.methods import TARGETS
from hiplora.training.data import load_examples
from hiplora.training.encoding import encode_examples


def check_inputs(
    model: str, data: SplitData, texts: Mapping[str, str], principal_rank: int, max_length: int
) -> list[str]:
    """Check model, data and drift texts against each other; return what the user should know about them.

    Raises:
        ConfigError: the model cannot be adapted as asked.
        DataError: no row has room for its response, or a text is too short.
    """
    check_targets(model, principal_rank)
    tokenizer = load_tokenizer(model)
    cut_windows(tokenizer, texts, window=512, max_tokens=512)
    with tempfile.TemporaryDirectory(prefix="hiplora-") as temporary:
        data.write(Path(temporary))
        train = Path(temporary) / "train.jsonl"
        _, said = encoded_rows(tokenizer, train, data.shape, max_length)
        _, said_heldout = encoded_rows(tokenizer, train.with_name("heldout.jsonl"), data.shape, max_length)
        shared = overlap(
            texts, [example.prompt + example.response for example in load_examples(train, data.shape)]
        )
    notes = [f"Training rows: {text}." for text in said] + [
        f"Held-out rows: {text}." for text in said_heldout
    ]
    return notes + [
        f"{share:.0%} of the drift text “{name}” stands in the training data too: its drift says little."
        for name, share in shared.items()
        if share
    ]


def check_targets(model: str, principal_rank: int) -> None:
    """Check, on the model without its weights, that it has the projections and that they are wide enough.

    Raises:
        ConfigError: it has none of them, one has no more than `principal_rank` directions, or there is no model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with quiet_transformers(), torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(resolve(model)))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model {model}: its configuration cannot be read ({first_line(error)}); expected a folder with "
            "config.json, a hub name that this machine can reach, or smollm2-135m"
        ) from error
    found = {
        name: tuple(module.weight.shape)
        for name, module in skeleton.named_modules()
        if name.rpartition(".")[2] in TARGETS and isinstance(getattr(module, "weight", None), torch.Tensor)
    }
    if not found:
        raise ConfigError(f"model {model}: has no modules named {', '.join(TARGETS)}, which compare adapts")
    name, shape = min(found.items(), key=lambda item: min(item[1]))
    if min(shape) <= principal_rank:
        raise ConfigError(
            f"--principal-rank is {principal_rank}, but layer {name} has only min(out, in) = {min(shape)} directions, "
            "which leaves none for the residual channel; lower it"
        )


def load_tokenizer(model: str) -> Any:
    """Load a model's tokenizer alone.

    Raises:
        ConfigError: it has none that can be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolve(model))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model {model}: has no tokenizer that can be loaded ({first_line(error)})"
        ) from error


def encoded_rows(tokenizer: Any, path: Path, shape: str, max_length: int) -> tuple[list[Encoded], list[str]]:
    """Tokenise a file's rows as training does; return them with warnings on what was cut or left out.

    Raises:
        DataError: no row has room for its response.
    """
    rows, report = encode_examples(tokenizer, load_examples(path, shape), max_length)
    return [Encoded(tuple(row["input_ids"]), tuple(row["labels"])) for row in rows], report.warnings(
        max_length
    )
