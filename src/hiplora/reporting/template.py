"""The frame of every page: the template's environment, the palette as CSS variables, the pictures drawn."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hiplora.reporting.canvas import Plate, css_variable, inline_svg
from hiplora.reporting.palette import LOOKS, NEUTRALS, Look, marker_path

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup


def render_page(
    template: str, title: str, styles: Mapping[str, Look], shown: Sequence[Plate], **values: Any
) -> str:
    """Fill a template with what every page needs (palette, pictures, the methods' looks) and with `values`."""
    light = {css_variable(colour): colour for colour in (*NEUTRALS, *(look.colour for look in LOOKS))}
    dark = {css_variable(look.colour): look.dark for look in LOOKS}
    dark |= {css_variable(colour): night for colour, night in NEUTRALS.items()}
    pictures = {
        plate.name: [inline_svg(panel, f"{plate.name}-{index}") for index, panel in enumerate(plate.panels)]
        for plate in shown
    }
    page = _environment().get_template(template)
    return page.render(
        title=title, light=light, dark=dark, plates=shown, pictures=pictures, styles=styles, **values
    )


def keep_together(text: str) -> "Markup":
    """Escape a sentence for HTML and keep names such as HiP-LoRA from being broken at their hyphen."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"\b\w+(?:-\w+)*-LoRA\b", r'<span class="whole">\g<0></span>', str(escape(text))))


@functools.cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("hiplora.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(css_variable=css_variable, marker_path=marker_path)
    environment.filters["whole"] = keep_together
    return environment
