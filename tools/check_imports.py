"""Check that imports point downwards only, and that light parts stay light.

    python tools/check_imports.py [SOURCE_FOLDER]

Reads the source; imports nothing. Exit status 1 and one line a violation.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "hiplora"

# From top to bottom: a room imports rooms of lower layers, never of its own layer or a higher one.
LAYERS = (
    {"cli"},
    {"demo", "tune"},
    {"compare", "study"},
    {"trainings"},
    {"compare_report", "merge_check", "protect", "editing", "probing"},
    {"training"},
    {"evaluation", "merging", "reporting", "export"},
    {"adapters", "data", "metrics"},
    {"tuner"},
    {"spectral", "models"},
    {
        "chat_template",
        "errors",
        "extras",
        "files",
        "positions",
        "devices",
        "provenance",
        "run_folder",
    },  # small modules that may use each other
)
_DEPTH = {room: depth for depth, layer in enumerate(LAYERS) for room in layer}

# Libraries that a room must not know, wherever the import stands.
_TRAINING = {"peft", "transformers", "trl", "accelerate", "datasets"}
UNKNOWN = {"spectral": _TRAINING, "metrics": _TRAINING | {"torch"}}
# Libraries that the command line imports only inside a command, so that `hiplora --help` is quick.
HEAVY = _TRAINING | {"torch", "numpy", "pandas", "scipy", "matplotlib", "safetensors"}


def violations(source: Path) -> list[str]:
    """List what is wrong in all files of the package in `source`, as `file:line: what`."""
    found = []
    for path in sorted((source / PACKAGE).rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        for module, line, at_module_level in imports(tree, parts, source):
            if said := _judge(parts[1], module, at_module_level):
                found.append(f"{path}:{line}: {said}")
    return found


def imports(node: ast.AST, parts: tuple[str, ...], source: Path, top: bool = True) -> Iterator[tuple[str, int, bool]]:
    """Yield every import below a node but those for type checkers: module, line, whether it runs with the module."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name, child.lineno, top) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from ((name, child.lineno, top) for name in _targets(child, parts, source))
        inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from imports(child, parts, source, top and not inside)


def _targets(node: ast.ImportFrom, parts: tuple[str, ...], source: Path) -> Iterator[str]:
    base = ".".join([*(parts[: -node.level] if node.level else ()), *([node.module] if node.module else [])])
    if base != PACKAGE:
        yield base
        return
    for alias in node.names:  # `from hiplora import tuner` names a room, `import HipLoraConfig` does not
        place = source / PACKAGE / alias.name
        is_room = place.is_dir() or place.with_suffix(".py").is_file()
        yield f"{PACKAGE}.{alias.name}" if is_room else f"{PACKAGE}:{alias.name}"


def _judge(room: str, module: str, at_module_level: bool) -> str | None:
    """Say what is wrong with an import in a room; a name from the package itself is `hiplora:NAME`."""
    package, _, rest = module.partition(".")
    name, target = package.partition(":")[2], rest.partition(".")[0]
    if name and room in _DEPTH and not name.startswith("__"):
        return f"imports {name} from the package's front door; import it from its own room"
    if package in UNKNOWN.get(room, ()):
        return f"{room} imports {package}, which it must not know"
    if room == "cli" and at_module_level and package in HEAVY:
        return f"cli imports {package} with the module; import it inside the command"
    # The package's own __init__ and __main__ stand above all rooms; `import hiplora` alone names none.
    if package != PACKAGE or not target or room in (target, "__init__", "__main__"):
        return None
    if unknown := [one for one in (room, target) if one not in _DEPTH]:
        return f"{unknown[0]} is in no layer; give it one in tools/check_imports.py"
    if _DEPTH[target] > _DEPTH[room] or {room, target} <= LAYERS[-1]:
        return None
    return f"{room} imports {target}, which is not below it"


def main(arguments: list[str]) -> int:
    """Print the violations; return the exit status."""
    source = Path(arguments[0]) if arguments else Path(__file__).resolve().parents[1] / "src"
    found = violations(source)
    print("\n".join(found), end="\n" * bool(found))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
