"""Check that imports point downwards only, and that light parts stay light.

    python tools/check_imports.py [SOURCE_FOLDER]

Reads the source; imports nothing. Exit status 1 and one line a violation.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "hiplora"

# From top to bottom: a room imports rooms of lower layers, never of its own layer or a higher one.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"cli"}),
    frozenset({"demo"}),
    frozenset({"compare", "study"}),
    frozenset({"compare_report", "merge_check", "protect", "editing", "probing"}),
    frozenset({"training"}),
    frozenset({"evaluation", "merging", "reporting", "export"}),
    frozenset({"adapters", "data", "metrics"}),
    frozenset({"tuner"}),
    frozenset({"spectral", "models"}),
    frozenset({"errors", "extras", "files", "provenance", "run_folder"}),
)
BOTTOM = LAYERS[-1]  # small modules that may use each other

_DEPTH = {room: depth for depth, layer in enumerate(LAYERS) for room in layer}

# Libraries that a room must not know, wherever the import stands.
UNKNOWN = {
    "spectral": frozenset({"peft", "transformers", "trl", "accelerate", "datasets"}),
    "metrics": frozenset({"peft", "transformers", "trl", "accelerate", "datasets", "torch"}),
}
# Libraries that the command line imports only inside a command, so that `hiplora --help` is quick.
HEAVY = frozenset(
    {
        "torch",
        "transformers",
        "peft",
        "trl",
        "accelerate",
        "datasets",
        "numpy",
        "pandas",
        "scipy",
        "matplotlib",
        "safetensors",
    }
)


@dataclass(frozen=True)
class Import:
    """One imported module, absolute, with the line it stands on and whether it runs with the module."""

    module: str
    line: int
    at_module_level: bool


def violations(source: Path) -> list[str]:
    """List what is wrong in all files of the package in `source`, as `file:line: what`."""
    found = []
    for path in sorted((source / PACKAGE).rglob("*.py")):
        module = path.relative_to(source).with_suffix("").parts
        room = module[1]
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        for item in imports(tree, module, source):
            if said := _judge(room, item):
                found.append(f"{path}:{item.line}: {said}")
    return found


def imports(tree: ast.Module, module: tuple[str, ...], source: Path) -> Iterator[Import]:
    """Yield every import of a module but those for type checkers only."""

    def walk(node: ast.AST, top: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                yield from (Import(name, child.lineno, top) for name in _targets(child, module, source))
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from walk(child, top and not inside)

    yield from walk(tree, True)


def _targets(node: ast.ImportFrom, module: tuple[str, ...], source: Path) -> Iterator[str]:
    base = node.module or ""
    if node.level:
        base = ".".join([*module[: -node.level], *([node.module] if node.module else [])])
    if base != PACKAGE:
        yield base
        return
    for alias in node.names:  # `from hiplora import tuner` names a room, `import HipLoraConfig` does not
        name = f"{PACKAGE}.{alias.name}"
        place = source.joinpath(*name.split("."))
        yield name if place.is_dir() or place.with_suffix(".py").is_file() else f"{PACKAGE}:{alias.name}"


def _judge(room: str, item: Import) -> str | None:
    package, _, rest = item.module.partition(".")
    if package.startswith(f"{PACKAGE}:"):
        name = package.partition(":")[2]
        light = room not in _DEPTH or name.startswith("__")
        return None if light else f"imports {name} from the package's front door; import it from its own room"
    if package == PACKAGE:
        return _judge_direction(room, rest.partition(".")[0])
    if package in UNKNOWN.get(room, ()):
        return f"{room} imports {package}, which it must not know"
    if room == "cli" and item.at_module_level and package in HEAVY:
        return f"cli imports {package} with the module; import it inside the command"
    return None


def _judge_direction(room: str, target: str) -> str | None:
    # The package's own __init__ and __main__ stand above all rooms; `import hiplora` alone names none.
    if not target or room == target or room in ("__init__", "__main__"):
        return None
    if unknown := [name for name in (room, target) if name not in _DEPTH]:
        return f"{unknown[0]} is in no layer; give it one in tools/check_imports.py"
    if _DEPTH[target] > _DEPTH[room] or (room in BOTTOM and target in BOTTOM):
        return None
    return f"{room} imports {target}, which is not below it"


def main(arguments: list[str]) -> int:
    """Print the violations; return the exit status."""
    source = Path(arguments[0]) if arguments else Path(__file__).resolve().parents[1] / "src"
    found = violations(source)
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
