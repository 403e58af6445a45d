"""Optional dependencies: which extra of the package brings a missing library.

`pip install hiplora` brings what the tuner needs. A room that needs more asks for its extra when it is imported, so
that the error names the way out.
"""

import importlib.util

from hiplora.errors import HipLoraError

EXTRAS = {
    "cli": ("typer", "rich", "yaml", "pydantic", "pandas"),
    "reports": ("pandas", "matplotlib", "jinja2", "tabulate"),
    "train": ("trl", "datasets", "accelerate", "yaml", "pydantic", "psutil"),
    "eval": ("lm_eval", "evaluate", "datasets", "pandas", "trl"),
    "ray": ("ray",),
    "quant": ("bitsandbytes",),
}


class MissingExtraError(HipLoraError, ImportError):
    """A library of an optional extra is not installed; the message names the extra."""


def require(extra: str) -> None:
    """Check that the libraries of an extra are installed, without importing them; else MissingExtraError."""
    for library in EXTRAS[extra]:
        if importlib.util.find_spec(library) is None:
            raise missing(library, extra)


def missing(library: str, extra: str | None = None) -> MissingExtraError:
    """Return the error for a library that is not installed."""
    extra = extra or next((name for name, libraries in EXTRAS.items() if library in libraries), "all")
    return MissingExtraError(f"{library} is not installed; run: pip install 'hiplora[{extra}]'")
