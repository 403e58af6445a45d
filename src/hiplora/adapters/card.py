"""What an exported folder says of itself: its model card, and `export.json` for programs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hiplora.adapters.adapter import AdapterUpdate, Update
from hiplora.files import write_atomic
from hiplora.provenance import provenance

_TITLES = {"lora": "Plain LoRA adapter", "hiplora": "HiP-LoRA adapter"}
_ORIGINS = {
    "merged": "a merge of several adapters",
    "projected": "an adapter projected off the directions of its layers' inputs",
}
_REMARKS = {
    "lora": "Scaling 1. Stock PEFT loads it:",
    "hiplora": "PEFT loads it once `hiplora` is imported:",
}


def write_record(
    update: Update,
    report: Mapping[str, Any],
    folder: Path,
    details: Mapping[str, Any] | None = None,
) -> None:
    """Write `export.json`: the report, where the update came from, `details`, and the provenance."""
    record = {**report, "source": update.source, "method": update.kind, **(details or {})}
    text = json.dumps(record | {"provenance": provenance()}, indent=2)
    write_atomic(folder / "export.json", text + "\n")


def write_card(
    update: AdapterUpdate,
    report: Mapping[str, Any],
    folder: Path,
    details: Mapping[str, Any] | None = None,
) -> None:
    """Write the model card of an exported adapter, and its `export.json`; `report` is the export's, for JSON."""
    write_record(update, report, folder, details)
    found, worst = report["logit_difference"], report["largest_difference"]
    logits = "were not compared" if found is None else f"differ by {found:.1e} of the largest one"
    origin = _ORIGINS.get(update.kind, f"a {update.kind} adapter")
    imports = "import hiplora\n" if report["to"] == "hiplora" else ""
    write_atomic(
        folder / "README.md",
        f"""---
base_model: {update.base or "unknown"}
library_name: peft
tags: [lora, hiplora]
---

# {_TITLES[report["to"]]}, exported from {origin}

Base model: `{update.base or "unknown"}`. Rank {report["rank"]}, {report["dtype"]}. {_REMARKS[report["to"]]}

```python
{imports}model = peft.PeftModel.from_pretrained(base_model, "path/to/this/folder")
```

It is the same update as what it was exported from: no module's differs by more than {worst["relative"]:.1e} of its norm
(`{worst["module"]}`), and the logits {logits}. `export.json` has every module and the provenance.
""",
    )


def write_model_card(
    update: Update,
    report: Mapping[str, Any],
    folder: Path,
    details: Mapping[str, Any] | None = None,
) -> None:
    """Write the model card of a standalone model, and its `export.json`; `report` is the export's, for JSON."""
    write_record(update, report, folder, details)
    worst, origin = report["largest_difference"], _ORIGINS.get(update.kind, f"a {update.kind} adapter")
    checks = "\n".join(f"- {check}" for check in report["checks"])
    write_atomic(
        folder / "README.md",
        f"""---
base_model: {report["base"]}
library_name: transformers
tags: [hiplora]
---

# {Path(report["base"]).name}, with {origin} merged in

Base model: `{report["base"]}`, {report["dtype"]}. {report["modules"]} of its layers were changed; no written weight
differs from the base weight plus the update by more than {worst["relative"]:.1e} of both
(`{worst["module"]}`). It loads like any model:

```python
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")
```

What was checked when it was written:

{checks}

`export.json` has where the update came from, and the provenance.
""",
    )
