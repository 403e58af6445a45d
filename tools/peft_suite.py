"""Run PEFT's own tests, of the installed version, with HiP-LoRA in their lists of methods.

    python -m tools.peft_suite [--suite test_custom_models] [--tests FOLDER] [--every N] [-- PYTEST OPTIONS]

The tests come from PEFT's source distribution, which pip downloads. Models of the Hub are replaced by tiny random ones
in a folder laid out as the Hub's cache, so nothing else is fetched. A custom model is no language model, so the
activation basis is measured there on random inputs. The module is its own pytest plugin.
"""

import argparse
import collections
import importlib.machinery
import importlib.metadata
import importlib.util
import itertools
import os
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path
from typing import Any

import pytest

SUITES = ("test_custom_models", "test_decoder_models")
COMMON = {"principal_rank": 1, "r": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {"preset": "paper"},
    "residual only": {"preset": "paper", "principal_channel": False},
    "gains, proximal": {"preset": "paper", "residual_projection": False, "stability_mode": "proximal"},
    "relative gains": {"preset": "paper", "relative_gains": True, "gain_lr_ratio": 2.0},
    "without factors": {"preset": "paper", "save_factors": False},
    "activation": {"basis": "activation", "principal_channel": True},
    "function-aware": {"preset": "function-aware"},
}
DECODERS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("gpt2", {}),
    "hf-internal-testing/tiny-random-gpt2": ("gpt2", {}),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("gptj", {"rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("llama", {}),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("mistral", {"num_key_value_heads": 2}),
    "peft-internal-testing/tiny-dummy-qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("gemma3_text", {"num_key_value_heads": 2, "head_dim": 8}),
}


def main() -> int:
    """Fetch the tests, lay out the models, run pytest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", action="append", choices=SUITES, help="a module of PEFT's tests; all if not given")
    parser.add_argument("--tests", type=Path, help="an unpacked source distribution of PEFT, instead of a download")
    parser.add_argument("--every", type=int, default=1, help="run every so many-th test only, as a sample")
    parser.add_argument("options", nargs="*", help="for pytest, after --")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source = given.tests or download(Path(scratch))
        (source / "tests" / "__init__.py").touch()
        hub = Path(scratch) / "hub"
        for name, (kind, settings) in DECODERS.items():
            make_model(hub, name, kind, settings)
        root = Path(__file__).resolve().parent.parent
        paths = [str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")]
        settings = {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "PEFT_SUITE_EVERY": str(given.every)}
        settings["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        files = [f"tests/{suite}.py" for suite in given.suite or SUITES]
        command = [sys.executable, "-m", "pytest", "-p", "tools.peft_suite", "-c", os.devnull, "--rootdir", ".", "-q"]
        command += ["-k", "HIPLORA or HipLora", "-W", "ignore", "--tb=line", *given.options, *files]
        return subprocess.run(command, cwd=source, env={**os.environ, **settings}).returncode


def download(folder: Path) -> Path:
    """Fetch and unpack the source distribution of the installed PEFT."""
    version = importlib.metadata.version("peft")
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation", "--no-binary", "peft"]
    subprocess.run([*pip, "-d", str(folder), f"peft=={version}"], check=True)
    with tarfile.open(folder / f"peft-{version}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"peft-{version}"


def make_model(hub: Path, name: str, kind: str, settings: dict[str, Any]) -> None:
    """Write a tiny random model with a tokenizer as the Hub's cache would hold it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.tiny import VOCABULARY, tiny_tokenizer

    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind in ("gpt2", "gptj"):
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4}
    if kind not in ("gpt2", "gptj", "opt"):
        sizes["intermediate_size"] = 64
    tokens = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, **sizes, **tokens, **settings)
    repository = hub / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    AutoModelForCausalLM.from_config(config).save_pretrained(snapshot)
    tiny_tokenizer().save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)


def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> None:
    """Put HiP-LoRA into a test module's lists before pytest reads them."""
    if not any(module_path.name in given for given in parent.config.args):
        return  # pytest asks about every file of the folder
    # PEFT's common tests import diffusers, which none of these tests needs.
    missing = importlib.util.find_spec("diffusers") is None
    if missing:
        stub: Any = types.ModuleType("diffusers")
        stub.StableDiffusionPipeline = type("Pipeline", (), {})
        stub.__spec__ = importlib.machinery.ModuleSpec("diffusers", None)
        sys.modules["diffusers"] = stub
    module: Any = importlib.import_module(f"tests.{module_path.stem}")
    if missing:
        del sys.modules["diffusers"]
    from hiplora import HipLoraConfig

    if module_path.stem == "test_custom_models":
        plain = [row for row in module.TEST_CASES if row[2] is module.LoraConfig and row[1] == "MLP"]
        plain = [row for row in plain if not row[3].keys() - {"target_modules", "modules_to_save"}]
        module.TEST_CASES[:] = [
            (f"{row[0]} HIPLORA {name}", row[1], HipLoraConfig, {**row[3], **COMMON, **variant})
            for row in plain
            for name, variant in VARIANTS.items()
        ]
        cases = module.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES
        cases.clear()
        for (name, variant), other in itertools.product(VARIANTS.items(), ("lin0", "lin1")):
            both = ({"target_modules": [one], **COMMON, **variant, "init_weights": False} for one in ("lin0", other))
            cases.append((f"HIPLORA {name} {other}", "hiplora", HipLoraConfig, *both))
        _measure_on_random_inputs()
    elif module_path.stem == "test_decoder_models":
        common = {"task_type": "CAUSAL_LM", "target_modules": None, **COMMON}
        kept = ("paper", "without factors", "function-aware")
        module.ALL_CONFIGS[:] = [(HipLoraConfig, common | VARIANTS[name]) for name in kept]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leave a sample of the tests."""
    every = int(os.environ.get("PEFT_SUITE_EVERY", "1"))
    if left := [item for number, item in enumerate(items) if number % every]:
        config.hook.pytest_deselected(items=left)
    items[:] = items[::every]


def _measure_on_random_inputs() -> None:
    import functools

    import torch

    from hiplora.tuner import model as tuner

    def calibrate(model: Any, config: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randint(0, 10, (64, 10), generator=generator)
        config.basis_sides = "input"  # these models give no logits
        first = next(model.parameters())
        if "dtype" in vars(model):  # which PEFT's tests set after the adapter is added
            model.dtype = first.dtype
        return original(model, config, run_model=functools.partial(model, inputs.to(first.device, first.dtype)))

    original, tuner.calibrate = tuner.calibrate, calibrate


_causes: collections.Counter[str] = collections.Counter()


def pytest_runtest_logreport(report: Any) -> None:
    """Count failures by what they say."""
    if report.failed:
        text = str(getattr(report.longrepr, "reprcrash", report.longrepr))
        _causes[text.partition(": ")[2].splitlines()[0][:150] if text else ""] += 1


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Show the failures by cause."""
    for cause, count in _causes.most_common():
        terminalreporter.write_line(f"{count:5} × {cause}")


if __name__ == "__main__":
    sys.exit(main())
