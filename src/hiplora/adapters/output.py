"""An exported folder: where it may be written, the report on it, its model card and `export.json`."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hiplora.adapters.update import AdapterUpdate
from hiplora.errors import ConfigError
from hiplora.files import check_output_dir
from hiplora.provenance import provenance

# What was written → the card's title and the code that loads it.
_CARDS = {
    "lora": (
        "Plain LoRA adapter",
        'model = peft.PeftModel.from_pretrained(base_model, "path/to/this/folder")',
    ),
    "hiplora": (
        "HiP-LoRA adapter",
        'import hiplora\nmodel = peft.PeftModel.from_pretrained(base_model, "path/to/this/folder")',
    ),
    "dense": (
        "Standalone model",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")',
    ),
}


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far it is from the adapter.

    `to` is "lora", "hiplora" or "dense". `modules` has one relative difference (Frobenius) per module, of the tensors
    as written: of an adapter ‖B'A' − ΔW‖/‖ΔW‖, of a dense model ‖W_written − (W + ΔW)‖ in units of ‖W‖ and ‖ΔW‖
    together. `logits` is the largest difference of a logit in units of the largest logit; None if logits were not
    compared, `note` says why. `ranks` is empty for a dense model; `untied` says that its output head got a weight of
    its own.
    """

    to: str
    path: str
    base: str
    dtype: str
    modules: Mapping[str, float]
    logits: float | None = None
    note: str = ""
    ranks: Mapping[str, int] = field(default_factory=dict)
    untied: bool = False

    @property
    def worst(self) -> tuple[str, float]:
        """The module that differs most, and by how much."""
        return max(self.modules.items(), key=lambda item: item[1])

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready record."""
        return {
            "schema": 1,
            "kind": "export",
            "to": self.to,
            "path": self.path,
            "base": self.base,
            "dtype": self.dtype,
            "rank": max(self.ranks.values(), default=None),
            "largest_difference": dict(zip(("module", "relative"), self.worst, strict=True)),
            "logit_difference": self.logits,
            "note": self.note,
            "untied": self.untied,
            "modules": [
                {"module": name, "rank": self.ranks.get(name), "difference": difference}
                for name, difference in self.modules.items()
            ],
        }


def check_out(path: str | os.PathLike, overwrite: bool, source: str, what: str = "the adapter") -> None:
    """Raise ConfigError unless a folder may be written: it is new, or replacing it does not delete `source`."""
    final = check_output_dir(path, overwrite).resolve()
    if os.path.isdir(source) and (Path(source).resolve() == final or final in Path(source).resolve().parents):
        raise ConfigError(f"--out {path}: replacing it would delete {what}; name another folder")


def write_card(
    update: AdapterUpdate, report: ExportReport, folder: Path, details: Mapping[str, Any] | None = None
) -> None:
    """Write an export's model card, and `export.json`: report, origin, `details` and provenance."""
    record = report.to_json() | {"source": update.source, "method": update.kind, **(details or {})}
    record["provenance"] = provenance()
    (folder / "export.json").write_text(json.dumps(record, indent=2) + "\n")
    module, difference = report.worst
    title, code = _CARDS[report.to]
    rank = f" Rank {record['rank']}, scaling 1." if report.ranks else ""
    logits = "were not compared" if report.logits is None else f"differ by {report.logits:.1e} of the largest"
    (folder / "README.md").write_text(f"""---
base_model: {report.base or "unknown"}
library_name: {"transformers" if report.to == "dense" else "peft"}
tags: [lora, hiplora]
---

# {title}

Exported by hiplora from an adapter (`{update.kind}`) of `{report.base or "unknown"}`.{rank} {report.dtype}.

```python
{code}
```

Verified on writing: the largest relative difference of a module is {difference:.1e} (`{module}`); logits {logits}.
`export.json` has every module, the origin and the provenance.
""")
