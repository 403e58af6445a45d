"""Generate docs/models.md from what tests/models found (docs/results/models.json)."""

import json
from pathlib import Path

FOUND = Path(__file__).resolve().parents[1] / "docs" / "results" / "models.json"

# What a model can do → the operations of tests/models that show it.
COLUMNS = {
    "training": ("attach", "train", "activation_basis"),
    "training of copies": ("copy",),
    "saving and loading": ("save_and_load",),
    "merging": ("disable", "merge_and_unmerge", "merge_and_unload"),
    "mixed batches": ("mixed_batch",),
    "bf16": ("half_precision",),
    "export as plain LoRA": ("export",),
    "calibration on its own text": ("self_calibration",),
}

INTRO = """# Does my model work?

HiP-LoRA adapts linear layers: `nn.Linear`, GPT-2's `Conv1D`, quantised layers that PEFT can dequantise, and the
experts of mixtures that transformers 5 keeps as 3-D parameters. A test suite trains, copies, saves, loads, merges
and exports an adapter on a tiny random model of each architecture, calibrates the model on its own text, and mixes
adapters in a batch; the last column of the table names what does not work. Other architectures with linear layers
work too; some need `target_modules`. `python -m pytest tests/models --models-json docs/results/models.json` repeats
the tests.

The default preset adapts the **MLP modules**, `preset="paper"` the **attention modules**; both are found by their
role. If an adapter seems to leave out modules that its targets mean, a warning names them with their share of the
weights.

"""

NOTES = """
- What does not work is refused, with a message that says what to do. A batch cannot mix adapters on experts; vLLM
  and llama.cpp take these as a whole model (`--to dense`). For a model that writes no text, the default preset needs
  `hiplora.calibrate(model, config, run_model=...)` on your data, with `basis_sides="input"` if it gives no logits.
- **Commands** that train, measure or write text take causal language models, including those that also see
  pictures. Other kinds are refused: adapt these in Python. Their adapters are inspected, exported and merged like any
  other.
- **Multimodal models**: the defaults are the text decoder's modules, without layers that only pictures reach (Llama 3.2
  Vision). To adapt a vision tower, name its modules and calibrate with `run_model` on data with pictures.
- **Experts** are adapted one by one: an adapter on all of them is large. Expert modules of Llama 4, JetMoE,
  LongCat-Flash and Step 3.7 are built differently, and are left out with a warning. Training runs one expert
  after the other, as transformers' "eager" implementation does.
- **Trainers**: any loop with a `torch.optim.Optimizer` over the adapter's parameters; see
  [training](howto/train.md).
- **Quantised bases**: bitsandbytes 4 and 8 bit, torchao int8 and HQQ (`make quantised` tests
  them), and other layers that PEFT can dequantise.
- **Serving**: export as plain LoRA for vLLM, llama.cpp and stock PEFT, or as a whole model; see
  [adapters](howto/adapters.md).
"""


def models_page() -> str:
    """Return the page: one row an architecture."""
    from tools.reference import NOTE, table

    rows = []
    for row in json.loads(FOUND.read_text(encoding="utf-8")):
        modules = (", ".join(f"`{name}`" for name in row[preset]) or "–" for preset in ("function-aware", "paper"))
        exceptions = "; ".join(filter(None, (_exception(row, *column) for column in COLUMNS.items())))
        rows.append((f"{row['name']} ({row['example_of']})", *modules, exceptions))
    header = ("architecture", "MLP modules", "attention modules", "does not work")
    return f"{INTRO.replace(chr(10), chr(10) + NOTE, 1)}{table(header, rows)}\n{NOTES}"


def _exception(row: dict, name: str, operations: tuple[str, ...]) -> str:
    if row["refused"].keys() & set(operations):
        return name
    return "" if all(row["found"].get(operation) == "passed" for operation in operations) else f"{name}: not yet"
