"""Figures in the project's style, as SVG."""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

import matplotlib.style
from matplotlib.figure import Figure

from hiplora.files import write_atomic

STYLE = Path(__file__).with_name("hiplora.mplstyle")


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Draw in the project's style inside the block."""
    with matplotlib.style.context(STYLE):
        yield


def svg(figure: Figure) -> str:
    """Return a figure as SVG; the same figure gives the same text."""
    file = io.StringIO()
    with styled():
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def save_figure(figure: Figure, stem: str | os.PathLike) -> Path:
    """Write a figure as `stem.svg` and return the path."""
    return write_atomic(f"{stem}.svg", svg(figure))
