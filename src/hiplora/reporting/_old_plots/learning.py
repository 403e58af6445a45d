"""What was learned: training loss against step, and held-out loss before and after."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hiplora.reporting._old_plots import bars
from hiplora.reporting.canvas import Panel, Plate, axes
from hiplora.reporting.numbers import fixed
from hiplora.reporting.palette import NEUTRAL, Look
from hiplora.reporting.results import Method

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

_SMOOTH_FROM = 40
_BEFORE = "before training"
LOSS_UNIT = "nats per response token"


def plate(methods: Sequence[Method], looks: Mapping[str, Look]) -> Plate | None:
    """Return the loss plate, or None where no method recorded a curve or a held-out loss."""
    found = (curves(methods, looks), heldout(methods, looks))
    panels = [panel for panel in found if panel is not None]
    if not panels:
        return None
    notes = ["Cross-entropy on the responses; lower is better."]
    if any(len(method.curve) >= _SMOOTH_FROM for method in methods):
        notes.append("Faint: each logged step. Bold: smoothed.")
    if found[1] is not None:
        notes.append("Held-out examples were not trained on.")
    legend = {method.name: looks[method.name] for method in methods if method.curve}
    return Plate("loss", "What was learned", " ".join(notes), panels, legend)


def curves(methods: Sequence[Method], looks: Mapping[str, Look]) -> Panel | None:
    """Return the panel of training-loss curves, or None without curves."""
    shown = [method for method in methods if any(math.isfinite(loss) for _, loss in method.curve)]
    if not shown:
        return None

    def draw(container: "FigureBase") -> None:
        ax = axes(container, "optimizer step", f"loss ({LOSS_UNIT})")
        for method in shown:
            look, steps, losses = looks[method.name], *zip(*method.curve, strict=True)
            finite = [loss if math.isfinite(loss) else math.nan for loss in losses]
            style: dict[str, Any] = {"color": look.colour, "dashes": look.dashes or (None, None)}
            if len(finite) >= _SMOOTH_FROM:
                ax.plot(steps, finite, color=look.colour, linewidth=1, alpha=0.3)
                ax.plot(steps, smooth(finite, len(finite) / 40), **style)
            else:
                ax.plot(steps, finite, marker=look.marker, markersize=4.5, **style)
        low, high = ax.get_ylim()
        ax.set_ylim(0 if 0 <= low < 0.4 * high else low, high)
        ax.margins(x=0.02)
        _whole_steps(ax)

    ends = "; ".join(f"{m.name} from {fixed(m.curve[0][1])} to {fixed(m.curve[-1][1])}" for m in shown)
    return Panel("loss-curves", "Training loss", f"Training loss over the steps: {ends} {LOSS_UNIT}.", draw)


def heldout(methods: Sequence[Method], looks: Mapping[str, Look]) -> Panel | None:
    """Return the panel of held-out losses after training, below the base model's, or None."""
    shown = [method for method in methods if method.loss_after is not None]
    if not shown:
        return None
    before = next((method.loss_before for method in methods if method.loss_before is not None), None)
    found = [bars.Bar(method.name, method.loss_after, fixed(method.loss_after)) for method in shown]
    if before is not None:
        found.insert(0, bars.Bar(_BEFORE, before, fixed(before)))
    group = bars.Group("", found)

    def draw(container: "FigureBase") -> None:
        bars.draw(container, [group], {**looks, _BEFORE: NEUTRAL}, f"held-out loss ({LOSS_UNIT})")

    return Panel("loss-heldout", "Held-out loss", bars.words([group]), draw, 460, bars.height([group]) + 20)


def smooth(values: Sequence[float], width: float) -> list[float]:
    """Return the Gaussian-weighted running mean (standard deviation `width` points); NaN entries are left out."""
    reach = math.ceil(3 * width)
    kernel = [math.exp(-0.5 * (offset / width) ** 2) for offset in range(reach + 1)]
    result = []
    for index in range(len(values)):
        near = range(max(0, index - reach), min(len(values), index + reach + 1))
        pairs = [(kernel[abs(at - index)], values[at]) for at in near if not math.isnan(values[at])]
        total = sum(weight for weight, _ in pairs)
        result.append(sum(weight * value for weight, value in pairs) / total if total else math.nan)
    return result


def _whole_steps(ax: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
