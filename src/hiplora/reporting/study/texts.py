"""Numbers and words of a study's tables: one way of writing each, and their escaping for LaTeX and Markdown."""

import re
from collections.abc import Mapping
from decimal import Decimal

from hiplora.reporting.numbers import NBSP, fixed, number

NOT_MEASURED = "–"
_MARKDOWN = str.maketrans({char: f"\\{char}" for char in r"\`*_|<>[]~"})
_GREEK = (
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu",
    "xi", "omicron", "pi", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega",
)  # fmt: skip
_LETTERS = "αβγδεζηθικλμνξοπρστυφχψω"
_CAPITALS = {"Γ": "Gamma", "Δ": "Delta", "Θ": "Theta", "Λ": "Lambda", "Σ": "Sigma", "Φ": "Phi", "Ω": "Omega"}
_SIGNS = {
    "±": "pm", "−": "-", "×": "times", "·": "cdot", "≤": "leq", "≥": "geq", "≈": "approx", "∞": "infty",
    "→": "rightarrow", "↑": "uparrow", "↓": "downarrow", "‖": "Vert", "✓": "surd", "†": "dagger", "ᵀ": "^{T}",
}  # fmt: skip
_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"
_LATEX: Mapping[str, str] = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}",
    "<": r"\textless{}", ">": r"\textgreater{}", '"': "''",
    # A bracket or star after a line's end would be read as that line's spacing.
    "[": "{[}", "]": "{]}", "*": "{*}",
    NBSP: "~", "–": "--", "—": "---", "…": r"\dots{}", "“": "``", "”": "''", "’": "'",
    **{char: f"\\{char}" for char in "&%$#_{}"},
    **{letter: "o" if name == "omicron" else rf"$\{name}$" for letter, name in zip(_LETTERS, _GREEK, strict=True)},
    **{letter: rf"$\{name}$" for letter, name in _CAPITALS.items()},
    **{sign: f"${name}$" if name[0] in "-^" else rf"$\{name}$" for sign, name in _SIGNS.items()},
}  # fmt: skip


def figure(value: float | None, digits: int) -> str:
    """Write a number with `digits` after the point and thousands separators; an en dash where there is none.

    One that would be all zeros so is written with three significant digits instead.
    """
    value = number(value)
    return NOT_MEASURED if value is None else fixed(value + 0.0, digits)


def paper_figure(value: float, digits: int) -> str:
    """Write the paper's number with `digits` after the point, or all of those that the paper gives if they are more."""
    given = Decimal(repr(float(value))).normalize().as_tuple().exponent
    more = -given if isinstance(given, int) and -6 <= given < 0 else 0
    return figure(value, max(digits, more))


def spread(low: float | None, high: float | None, sd: float | None, digits: int) -> str:
    """Write what follows a value: ` ± sd` where the spread over seeds is given, ` [low, high]` where an interval is."""
    told = "" if number(sd) is None else f"{NBSP}±{NBSP}{figure(sd, digits)}"
    if number(low) is not None or number(high) is not None:
        told += f" [{figure(low, digits)}, {figure(high, digits)}]"
    return told


def one_line(text: str) -> str:
    """Return `text` on one line and without control characters; no-break spaces stay."""
    flat = re.sub(r"[^\S\xa0]+", " ", text)
    return "".join(char for char in flat if char.isprintable() or char == NBSP)


def markdown(text: str) -> str:
    """Escape `text` for a cell or a line of Markdown."""
    return one_line(text).translate(_MARKDOWN)


def latex(text: str) -> str:
    """Escape `text` for LaTeX: its special characters, and the signs and Greek letters that pdfLaTeX lacks."""
    runs = re.split(f"([{_SUPERSCRIPTS}]+)", one_line(text))
    return "".join(
        f"$^{{{_plain_digits(run)}}}$" if place % 2 else "".join(_LATEX.get(char, char) for char in run)
        for place, run in enumerate(runs)
    )


def _plain_digits(run: str) -> str:
    return "".join("0123456789-"[_SUPERSCRIPTS.index(char)] for char in run)
