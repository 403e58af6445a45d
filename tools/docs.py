"""Write the generated parts of the documentation, or check that they are current and that the rest is true.

    python -m tools.docs [--check]

- docs/reference/*.md follow from the code;
- a block between `<!-- table: FILE.csv -->` and `<!-- /table -->` is that table of docs/results;
- every `hiplora.…` name in backticks exists, and every link inside the repository leads to a file and heading;
- every number listed in `docs/numbers.csv` is the one in its JSON result;
- no tracked file names a folder of somebody's machine.
"""

import csv
import functools
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

_NAME = re.compile(r"`(hiplora(?:\.[A-Za-z_]\w*)+)(?:\([^`]*\))?`")
_AUTODOC = re.compile(r"^\.\. (?:(currentmodule)|auto\w+):: (\S+)", re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_TABLE = re.compile(r"(<!-- table: (?P<file>\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)
_FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.DOTALL | re.MULTILINE)
_PRIVATE = re.compile(
    r"/ho(?:)me/[a-z]\w+/|/Us(?:)ers/[a-zA-Z]\w+/|/ro(?:)ot/|/wo(?:)rk/(?:main|shared)"
)  # the empty groups keep this line from matching itself


def tracked(root: Path, *patterns: str) -> list[Path]:
    """Return the tracked files that match; all files on disk where `root` is not a git checkout."""
    listed = subprocess.run(["git", "ls-files", "-z", "--", *patterns], cwd=root, capture_output=True, text=True)
    if listed.returncode == 0:
        return [path for name in listed.stdout.split("\0") if name and (path := root / name).is_file()]
    return [path for pattern in patterns or ("*",) for path in root.rglob(pattern) if path.is_file()]


def generated(root: Path) -> dict[Path, str]:
    """Return every page with generated parts: path -> the text that it should have."""
    from tools.reference import pages

    found = {root / "docs" / name: text for name, text in pages().items()}
    for path in tracked(root, "*.md"):
        text = path.read_text(encoding="utf-8")
        if _TABLE.search(text):
            found[path] = _TABLE.sub(lambda match: f"{match[1]}\n{_table(root / match['file'])}\n\n{match[3]}", text)
    return found


def _table(path: Path) -> str:
    """Return a CSV file as a Markdown table."""
    from tools.reference import table

    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    return table(tuple(header), [tuple(row) for row in rows])


def check_generated(root: Path) -> Iterator[str]:
    """Yield every page whose generated parts are out of date."""
    for path, text in generated(root).items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            yield f"{path.relative_to(root)}: out of date; run `make docs`"


def check_names(root: Path) -> Iterator[str]:
    """Yield every dotted hiplora name, in backticks or documented by Sphinx, that cannot be imported."""
    for path in tracked(root, "*.md"):
        text = path.read_text(encoding="utf-8")
        for name in sorted({*_NAME.findall(text), *documented(text)}):
            if not name_exists(name):
                yield f"{path.relative_to(root)}: `{name}` does not exist"


def documented(text: str) -> Iterator[str]:
    """Yield the names that a page has Sphinx document."""
    module = ""
    for current, name in _AUTODOC.findall(text):
        if current:
            module = name
        yield name if current else f"{module}.{name}"


@functools.cache
def name_exists(name: str) -> bool:
    """Return whether a dotted name is a module, or an attribute of one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if not hasattr(found, part) and part not in getattr(found, "__dataclass_fields__", ()):
                return False
            found = getattr(found, part, None)
        return True
    return False


def check_links(root: Path) -> Iterator[str]:
    """Yield every link inside the repository that leads nowhere."""
    for path in tracked(root, "*.md"):
        for target in _LINK.findall(_FENCE.sub("", path.read_text(encoding="utf-8"))):
            if re.match(r"[a-z]+:", target):
                continue
            file, _, anchor = target.partition("#")
            place = (path.parent / file).resolve() if file else path
            if not place.exists():
                yield f"{path.relative_to(root)}: link to {target}: no such file"
            elif anchor and anchor not in anchors(place.read_text(encoding="utf-8")):
                yield f"{path.relative_to(root)}: link to {target}: no such heading"


def anchors(text: str) -> set[str]:
    """Return the anchors that the headings of a Markdown text get."""
    headings = re.findall(r"^#+ +(.+?) *#*$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def check_numbers(root: Path) -> Iterator[str]:
    """Yield every number of docs/numbers.csv that differs from its result, or that the page does not show.

    Columns: page; text with `{}` in place of each number; JSON file; path of each number in it, keys joined by `/`;
    format of each number, or one for all. Several paths or formats are joined by `; `.
    """
    with (root / "docs/numbers.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            record = json.loads((root / row["file"]).read_text(encoding="utf-8"))
            values = [_value(record, path) for path in row["path"].split("; ")]
            formats = row["format"].split("; ")
            formats *= len(values) if len(formats) == 1 else 1
            shown = row["text"].format(*map(format, values, formats))
            if shown not in " ".join((root / row["page"]).read_text(encoding="utf-8").split()):
                yield f"{row['page']}: expected “{shown}” ({row['file']}: {row['path']})"


def _value(record: Any, path: str) -> Any:
    for key in path.split("/"):
        record = record[int(key)] if isinstance(record, list) else record[key]
    return record


def check_private(root: Path) -> Iterator[str]:
    """Yield every tracked text that names a folder of somebody's machine."""
    for path in tracked(root):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if found := _PRIVATE.search(line):
                yield f"{path.relative_to(root)}:{number}: names a folder of one machine ({found[0]})"


CHECKS = (check_generated, check_names, check_links, check_numbers, check_private)


def main(arguments: list[str]) -> int:
    """Write the generated parts, or run every check and print what is wrong."""
    if "--check" not in arguments:
        for path, text in generated(ROOT).items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return 0
    problems = [problem for check in CHECKS for problem in check(ROOT)]
    print("\n".join(problems), end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
