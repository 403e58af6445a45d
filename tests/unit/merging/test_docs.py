import json
from pathlib import Path

from hiplora.merging import RULES

METHOD = Path(__file__).resolve().parents[3] / "docs" / "method.md"


def rules_table():
    """The table of docs/method.md as it should be, from the registry."""
    rows = [
        "| rule | works on | options | what it gives | from | function |",
        "|---|---|---|---|---|---|",
    ]
    for name, rule in RULES.items():
        values = {k: "none" if v is None else json.dumps(v) for k, v in rule.defaults.items()}
        options = ", ".join(f"`{option}={value}`" for option, value in values.items()) or "–"
        on = "thin factors" if rule.kind == "factors" else "entries"
        rows.append(
            f"| `{name}` | {on} | {options} | {rule.summary} | {rule.source} | `{rule.home}.combine` |"
        )
    return "\n".join(rows) + "\n"


def test_the_methods_page_lists_the_rules_of_the_registry():
    assert rules_table() in METHOD.read_text(encoding="utf-8"), (
        f"docs/method.md should have:\n{rules_table()}"
    )
