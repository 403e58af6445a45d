"""Check that the documentation tells the truth; with `--write`, put right what can be put right by itself.

    python -m tools.check_docs [--write]

- docs/reference.md is what the code says of its commands and settings;
- every `hiplora.…` name in the documentation exists;
- every link to a file or heading of this repository leads there;
- every number between `<!-- result: FILE KEY... FORMAT -->` and `<!-- end -->` is the one in the JSON result;
- every JSON result says where it comes from;
- no file names a folder of somebody's machine.
"""

import functools
import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = "docs/reference.md"

_NAME = re.compile(r"`(hiplora(?:\.[A-Za-z_]\w*)+)(?:\([^`]*\))?`")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
_RESULT = re.compile(r"(<!-- result: (?P<what>[^>]*?) -->)(?P<shown>.*?)(<!-- end -->)", re.DOTALL)
_FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.DOTALL | re.MULTILINE)
# Put together here so that this file does not find itself.
_PRIVATE = re.compile(
    "|".join(
        ["/home" + r"/[a-z]\w+/", "/Users" + r"/[a-zA-Z]\w+/", "/root" + "/", "/work" + r"/(main|shared)"]
    )
)


def tracked(root: Path, *patterns: str) -> list[Path]:
    """Return the tracked files that match, or all of them on disk where this is no git checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--", *patterns], cwd=root, capture_output=True, text=True
    )
    if listed.returncode == 0:
        return [path for name in listed.stdout.split("\0") if name and (path := root / name).is_file()]
    return [
        path
        for pattern in patterns or ("*",)
        for path in root.rglob(pattern)
        if path.is_file() and not _hidden(path, root)
    ]


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def check_reference(root: Path, write: bool = False) -> Iterator[str]:
    """The generated reference is up to date."""
    from tools.docs_reference import reference

    path, expected = root / REFERENCE, reference()
    if path.is_file() and path.read_text(encoding="utf-8") == expected:
        return
    if write:
        path.write_text(expected, encoding="utf-8")
    else:
        yield f"{REFERENCE}: differs from the code; run `make docs`"


def check_names(root: Path, write: bool = False) -> Iterator[str]:
    """Every dotted hiplora name in backticks can be imported."""
    for path in tracked(root, "*.md"):
        for name in sorted(set(_NAME.findall(path.read_text(encoding="utf-8")))):
            if not name_exists(name):
                yield f"{path.relative_to(root)}: `{name}` does not exist"


@functools.cache
def name_exists(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute (of an attribute…) of one."""
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


def check_links(root: Path, write: bool = False) -> Iterator[str]:
    """Every link inside the repository leads to a file and, after `#`, to a heading."""
    for path in tracked(root, "*.md"):
        text = _FENCE.sub("", path.read_text(encoding="utf-8"))
        for match in _LINK.finditer(text):
            target = match[1] or match[2]
            if re.match(r"[a-z]+:", target):
                continue
            file, _, anchor = target.partition("#")
            place = (path.parent / file).resolve() if file else path
            if not place.exists():
                yield f"{path.relative_to(root)}: link to {target}: no such file"
            elif anchor and anchor not in anchors(place.read_text(encoding="utf-8")):
                yield f"{path.relative_to(root)}: link to {target}: no such heading"


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a Markdown text."""
    headings = re.findall(r"^#+ +(.+?) *#*$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def check_results(root: Path, write: bool = False) -> Iterator[str]:
    """Every number marked as a result is the one in its JSON file, as formatted."""
    for path in tracked(root, "*.md"):
        text, name = path.read_text(encoding="utf-8"), path.relative_to(root)
        right, problems = with_right_results(text, root)
        yield from (f"{name}: {problem}" for problem in problems)
        if len(_RESULT.findall(text)) != text.count("<!-- result:"):
            yield f"{name}: a result marker has no `<!-- end -->`"
        if right == text:
            continue
        if write:
            path.write_text(right, encoding="utf-8")
        else:
            wrong = [
                m["what"]
                for m, new in zip(_RESULT.finditer(text), _RESULT.finditer(right), strict=True)
                if m[0] != new[0]
            ]
            yield from (f"{name}: result {what}: not what the file says; run `make docs`" for what in wrong)


def with_right_results(text: str, root: Path) -> tuple[str, list[str]]:
    """Return the text with every marked number as its file says, and what is wrong with markers."""
    problems: list[str] = []

    def right(match: re.Match[str]) -> str:
        try:
            shown = result_text(root, match["what"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            problems.append(f"result {match['what']}: {type(error).__name__}: {error}")
            return match[0]
        return f"{match[1]}{shown}{match[4]}"

    pieces, end = [], 0
    for fence in _FENCE.finditer(text):  # what stands in a code block is an example
        pieces += [_RESULT.sub(right, text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*pieces, _RESULT.sub(right, text[end:])]), problems


def result_text(root: Path, marker: str) -> str:
    """Format the value that a marker `FILE KEY [KEY…] FORMAT` names; a list's key is an index, `%` a per cent.

    A key that has spaces goes in quotes. Example: `docs/results/step.json ratio dropout_0 .2f`.
    """
    file, *keys, form = shlex.split(marker)
    value = json.loads((root / file).read_text(encoding="utf-8"))
    for key in keys:
        value = value[int(key)] if isinstance(value, list) else value[key]
    return format(value, form)


def check_provenance(root: Path, write: bool = False) -> Iterator[str]:
    """Every committed result, and each row of a table, names the commit, the libraries and the machine that made it."""
    for path in tracked(root, "docs/results/*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        rows = record if isinstance(record, list) and record else [record]
        lacking = [_lacking(row if isinstance(row, dict) else {}) for row in rows]
        if missing := list(dict.fromkeys(key for keys in lacking for key in keys)):
            yield f"{path.relative_to(root)}: provenance without {', '.join(missing)}"


def _lacking(record: dict[str, Any]) -> list[str]:
    """Return what a record, or a row of a table (`report.commit`), does not say of where it comes from."""
    told = dict(record.get("provenance", {}))
    told |= {key.split(".")[1]: value for key, value in record.items() if key.startswith("report.")}
    return [key for key in ("time", "commit", "libraries", "machine") if not told.get(key)]


def check_private(root: Path, write: bool = False) -> Iterator[str]:
    """No tracked text names a folder of somebody's machine."""
    for path in tracked(root):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if found := _PRIVATE.search(line):
                yield f"{path.relative_to(root)}:{number}: names a folder of one machine ({found[0]})"


CHECKS = (check_reference, check_names, check_links, check_results, check_provenance, check_private)


def main(arguments: list[str]) -> int:
    """Run every check and print what is wrong; return the exit status."""
    problems = [problem for check in CHECKS for problem in check(ROOT, write="--write" in arguments)]
    print("\n".join(problems), end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
