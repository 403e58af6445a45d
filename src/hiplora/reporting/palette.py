"""Colours and marks: one per method, the same in every figure, table and tile.

The hues are those of Okabe and Ito's colour-blind-safe set, darkened to at least 3:1 against white, with a
lighter partner of at least 3:1 for dark backgrounds. Colour never stands alone: bars and rows carry the
method's name, lines have their own dash and marker.
"""

from collections.abc import Iterable
from dataclasses import dataclass

INK, MUTED, RULE, GRID, PAPER = "#1d2230", "#5a6373", "#c3cad4", "#e6eaf0", "#ffffff"

# Light value, dark value: the page maps the first to the second where the reader prefers a dark page.
NEUTRALS = {INK: "#e8ebf1", MUTED: "#a3adbd", RULE: "#4a5364", GRID: "#2c3341", PAPER: "#161a22"}


@dataclass(frozen=True)
class Look:
    """How a method is drawn: colour on light and dark pages, dash pattern (empty: solid) and marker.

    A hollow marker is filled with the page's colour: what is shown beside the measured, not measured itself.
    """

    colour: str
    dark: str
    dashes: tuple[float, ...]
    marker: str
    hollow: bool = False


LOOKS = (
    Look("#0b63a5", "#62b5f5", (), "o"),
    Look("#cf5300", "#ff8f4d", (5, 2), "s"),
    Look("#00805c", "#3ccf9f", (1.5, 1.5), "^"),
    Look("#a8478a", "#e894ca", (6, 2, 1.5, 2), "D"),
    Look("#94690a", "#e3b23f", (3, 1.5), "v"),
    Look("#2f8fc9", "#a6d8ff", (8, 2), "P"),
    Look("#6250a8", "#b3a3f5", (2, 1), "X"),
    Look("#5f6b32", "#b9c77a", (4, 1, 1, 1), "*"),
)
# The base model, which is no method.
NEUTRAL = Look(MUTED, NEUTRALS[MUTED], (), "o")
_KNOWN = {
    "hiplora": 0,
    "lora": 1,
    "projlora": 2,
    "projloraoplora": 2,
    "pissa": 3,
    "adalora": 4,
    "hiploraactivation": 5,
    "loraonthemlps": 6,
}

_MARKER_PATHS = {
    "s": "M9.5 2h7v7h-7z",
    "^": "M13 1l4.6 8h-9.2z",
    "v": "M13 10l4.6-8h-9.2z",
    "D": "M13 .6l4.9 4.9l-4.9 4.9l-4.9-4.9z",
    "d": "M13 .4l3.3 5.1l-3.3 5.1l-3.3-5.1z",
    "<": "M8.4 5.5l8-4.6v9.2z",
    ">": "M17.6 5.5l-8-4.6v9.2z",
    "P": "M11.4 .8h3.2v3.1h3.1v3.2h-3.1v3.1h-3.2v-3.1h-3.1v-3.2h3.1z",
    "X": "M8.6 3.3l2.2-2.2l2.2 2.2l2.2-2.2l2.2 2.2l-2.2 2.2l2.2 2.2l-2.2 2.2l-2.2-2.2l-2.2 2.2l-2.2-2.2l2.2-2.2z",
    "*": "M13 .2l1.3 3.8h4l-3.2 2.4l1.2 3.9l-3.3-2.4l-3.3 2.4l1.2-3.9l-3.2-2.4h4z",
}


def marker_path(look: Look) -> str:
    """Return the SVG path of a method's marker in a 26 × 11 legend key (a disc where it has no simpler one)."""
    return _MARKER_PATHS.get(look.marker, "M9 5.5a4 4 0 1 0 8 0a4 4 0 1 0-8 0z")


def looks(names: Iterable[str]) -> dict[str, Look]:
    """Assign a look to each method: known methods get theirs whatever else is there, the others what is free."""
    ordered = list(dict.fromkeys(names))
    taken: dict[str, int] = {}
    for name in ordered:
        index = _KNOWN.get(plain(name))
        if index is not None and index not in taken.values():
            taken[name] = index
    for name in ordered:
        if name not in taken:
            prefix = _KNOWN["hiplora"] if is_hiplora(name) else None
            free = [index for index in range(len(LOOKS)) if index not in taken.values()]
            taken[name] = prefix if prefix in free else free[0] if free else len(taken) % len(LOOKS)
    return {name: LOOKS[taken[name]] for name in ordered}


def plain(name: str) -> str:
    """Return the name's letters and digits in lower case: HiP-LoRA, hip_lora and hiplora are one method."""
    return "".join(char for char in name.lower() if char.isalnum())


def is_known(name: str) -> bool:
    """Say whether a method's name is one that always has the same look."""
    return plain(name) in _KNOWN


def is_hiplora(name: str) -> bool:
    """Say whether a method's name is HiP-LoRA or a variant of it."""
    return plain(name).startswith("hiplora")
