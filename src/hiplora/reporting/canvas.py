"""Plates and panels: drawn once with matplotlib, shown inline in a page or saved as SVG and PNG files.

A panel is one small picture; a plate is a row of panels under one heading. Panels are at most about 460 CSS
pixels wide, so that a page can stack them on a phone without shrinking their text; a plate saved as a file is
all its panels side by side with a legend. Nothing here uses pyplot: no global figures, no display.
"""

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from hiplora.reporting import legends
from hiplora.reporting.palette import GRID, INK, LOOKS, MUTED, NEUTRALS, PAPER, RULE, Look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

FONT_STACK = (
    "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
)
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
# The size is in points and one point of the drawing is one CSS pixel of the page (72 per inch in the SVG).
_PER_INCH = 72
# What matplotlib would write of itself and of the time, per format: the same drawing gives the same bytes.
_UNDATED: Any = {
    "png": {"Software": None},
    "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
}
_STYLE: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 12.5,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 12.5,
    "axes.titlesize": 12.5,
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 1.0,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "lines.scale_dashes": True,
    "path.simplify": False,
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "svg.hashsalt": "hiplora",
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
}


@dataclass(frozen=True)
class Panel:
    """One picture: `draw` fills a figure or subfigure of `width` × `height` CSS pixels.

    `description` says in words what the picture shows, for readers who cannot see it.
    """

    name: str
    title: str
    description: str
    draw: Callable[["FigureBase"], None]
    width: int = 460
    height: int = 300


@dataclass(frozen=True)
class Plate:
    """Panels under one heading, with the caption that says how to read them and the methods they show."""

    name: str
    heading: str
    caption: str
    panels: Sequence[Panel]
    legend: Mapping[str, Look] = field(default_factory=dict)

    @property
    def columns(self) -> int:
        """How many panels stand side by side where there is room: narrow ones three, others two."""
        return 3 if len(self.panels) > 2 and all(panel.width <= 360 for panel in self.panels) else 2


def inline_svg(panel: Panel, prefix: str) -> str:
    """Draw a panel as an `<svg>` element for an HTML page: themed by CSS variables, accessible, no ids shared.

    Colours of the palette become `var(--…)` with the light value as fall-back; `prefix` keeps the ids of
    several pictures on one page apart.
    """
    with _drawing():
        figure = _figure(panel.width, panel.height)
        _draw(panel, figure)
        root = _svg_tree(figure)
    _strip(root, prefix)
    _label(root, panel, prefix)
    for attribute in ("width", "height"):
        root.attrib.pop(attribute, None)
    root.set("class", "plot")
    root.set("style", f"max-width:{panel.width}px")
    return _themed(ET.tostring(root, encoding="unicode"))


def plate_files(plate: Plate, formats: Sequence[str] = ("svg",)) -> dict[str, bytes]:
    """Draw a whole plate, legend included, on a white ground; return the bytes per format (`svg`, `png`, `pdf`)."""
    with _drawing():
        figure = _compose(plate)
        files = {}
        for kind in formats:
            if kind == "svg":
                files[kind] = _standalone(figure, plate)
            else:
                buffer = io.BytesIO()
                figure.savefig(
                    buffer, format=kind, dpi=2 * _PER_INCH, facecolor=PAPER, metadata=_UNDATED[kind]
                )
                files[kind] = buffer.getvalue()
    return files


def axes(
    container: "FigureBase", xlabel: str = "", ylabel: str = "", grid: Literal["x", "y", "both"] = "y"
) -> "Axes":
    """Add the single axes of a plain panel, with labels and a light grid along `grid` (`x`, `y`, `both`)."""
    ax = container.subplots()
    dress(ax, xlabel, ylabel, grid)
    return ax


def dress(ax: "Axes", xlabel: str = "", ylabel: str = "", grid: Literal["x", "y", "both"] = "y") -> None:
    """Give axes the house look: labels, light grid, no tick marks."""
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.tick_params(length=0, which="both", pad=5)
    ax.grid(axis=grid)


@contextmanager
def _drawing() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # A name in a script that the measuring font lacks still shows: the browser has its own fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        # A panel too small for a very long label is laid out as well as it can be.
        warnings.filterwarnings("ignore", message="constrained_layout not applied")
        yield


def _figure(width: int, height: int) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / _PER_INCH, height / _PER_INCH), dpi=_PER_INCH)
    figure.set_layout_engine("constrained", w_pad=6 / _PER_INCH, h_pad=5 / _PER_INCH)
    FigureCanvasAgg(figure)
    return figure


def _draw(panel: Panel, container: "FigureBase") -> None:
    title = container.suptitle(panel.title, x=0.012, ha="left", fontsize=13.5, fontweight="bold")
    title.set_color(INK)
    panel.draw(container)


def _compose(plate: Plate) -> "Figure":
    rows = [
        plate.panels[start : start + plate.columns] for start in range(0, len(plate.panels), plate.columns)
    ]
    heights = [max(panel.height for panel in row) for row in rows]
    width = max(sum(panel.width for panel in row) for row in rows)
    legend = legends.height(plate.legend, width)
    figure = _figure(width, sum(heights) + legend)
    bands = figure.subfigures(len(rows) + 1, 1, height_ratios=[max(legend, 1), *heights], squeeze=False)[:, 0]
    if plate.legend:
        legends.draw(bands[0], plate.legend, width)
    for band, row in zip(bands[1:], rows, strict=True):
        ratios = [panel.width for panel in row]
        spare = width - sum(ratios)
        cells = band.subfigures(
            1, len(row) + (spare > 0), width_ratios=ratios + [spare] * (spare > 0), squeeze=False
        )
        for panel, cell in zip(row, cells[0], strict=False):
            _draw(panel, cell)
    return figure


def _svg_tree(figure: "Figure") -> ET.Element:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    return ET.fromstring(buffer.getvalue())


def _strip(root: ET.Element, prefix: str) -> None:
    """Remove matplotlib's metadata, page-wide style and unused ids; number those that are referred to."""
    for child in list(root):
        if child.tag == f"{{{_SVG}}}metadata" or child.find(f"{{{_SVG}}}style") is not None:
            root.remove(child)
    text = ET.tostring(root, encoding="unicode")
    # matplotlib's ids are hashes of coordinates, of which the last bits may differ from run to run: number them.
    used = dict.fromkeys(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", text))
    ids = {first or second: f"{prefix}-{place}" for place, (first, second) in enumerate(used)}
    for element in root.iter():
        if (name := element.get("id")) is not None:
            if name in ids:
                element.set("id", ids[name])
            else:
                del element.attrib["id"]
        for key, value in element.attrib.items():
            if key.endswith("href") and value.startswith("#"):
                element.set(key, f"#{ids[value[1:]]}")
            elif value.startswith("url(#"):
                element.set(key, f"url(#{ids[value[5:-1]]})")
            elif key == "style":
                element.set(key, re.sub(r" ?font-family: [^;]*;?", "", value))
            elif key == "d":
                element.set(key, _compact(value))


def _compact(path: str) -> str:
    """Round a path's coordinates to a hundredth of a pixel: a third of the size, nothing to be seen."""
    return re.sub(
        r"-?\d+\.\d+", lambda found: f"{float(found.group()):.2f}".rstrip("0").rstrip("."), path
    ).replace("\n", "")


def _label(root: ET.Element, panel: Panel, prefix: str) -> None:
    root.set("role", "img")
    root.set("aria-labelledby", f"{prefix}-title {prefix}-desc")
    for index, (tag, text) in enumerate((("title", panel.title), ("desc", panel.description))):
        element = ET.Element(f"{{{_SVG}}}{tag}", {"id": f"{prefix}-{tag}"})
        element.text = text
        root.insert(index, element)


def _themed(svg: str) -> str:
    """Replace the palette's colours inside style attributes by CSS variables of the page."""
    known = {*NEUTRALS, *(look.colour for look in LOOKS)}

    def swap(found: re.Match[str]) -> str:
        colour = found.group().lower()
        return f"var({css_variable(colour)},{colour})" if colour in known else colour

    return re.sub(r'(?<=style=")[^"]*', lambda style: re.sub(r"#[0-9a-fA-F]{6}\b", swap, style.group()), svg)


def css_variable(colour: str) -> str:
    """Return the name of the CSS variable that carries a palette colour."""
    return f"--c{colour.lstrip('#').lower()}"


def _standalone(figure: "Figure", plate: Plate) -> bytes:
    figure.set_facecolor(PAPER)
    root = _svg_tree(figure)
    figure.set_facecolor("none")
    _strip(root, plate.name)
    _label(root, Panel(plate.name, plate.heading, _describe(plate), lambda _: None), plate.name)
    root.set("font-family", FONT_STACK)
    root.set("stroke-linejoin", "round")
    return ET.tostring(root, encoding="utf-8", xml_declaration=True)


def _describe(plate: Plate) -> str:
    return " ".join(f"{panel.title}: {panel.description}" for panel in plate.panels)
