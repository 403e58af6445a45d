"""The plots: what is in the data is in the picture."""

import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from hiplora.reporting import plots
from hiplora.reporting.plots import save_figure

ROWS = pd.DataFrame(
    {
        "method": ["LoRA", "LoRA", "mine", "yours"],
        "task": ["code", "maths", "code", "maths"],
        "loss": [1.0, 0.5, 1.1, 0.6],
        "drift": [0.1, 0.4, 0.01, 0.05],
        "low": [0.05, 0.3, 0.005, 0.04],
        "high": [0.2, 0.5, 0.02, 0.06],
    }
)
BOTH = {"low": "low", "high": "high", "x_low": "low", "x_high": "high"}
CALLS = {
    "lines": lambda df: plots.lines(df, "loss", "drift", "method", **BOTH, label="task", logy=True),
    "scatter": lambda df: plots.scatter(df, "loss", "drift", "method", guides=(0.01, 0.1), logx=True, logy=True),
    "heatmap": lambda df: plots.heatmap(df.pivot(index="method", columns="task", values="drift")),
    "facets": lambda df: plots.facets(df, "task", plots.scatter, x="loss", y="drift", group="method"),
}


@pytest.mark.parametrize("name", CALLS)
def test_missing_values_and_bounds_are_drawn_as_gaps(name, tmp_path):
    gaps = ROWS.assign(drift=[0.1, math.nan, 0.01, 0.05], low=math.nan, high=math.nan)
    assert save_figure(CALLS[name](gaps), tmp_path / name).stat().st_size > 1000


def test_each_method_has_its_look_and_error_bars_from_low_to_high():
    ax = plots.lines(ROWS, "loss", "drift", "method", low="low", high="high", xlabel="x").axes[0]
    np.testing.assert_allclose(ax.containers[0].lines[0].get_xydata(), [[1.0, 0.1], [0.5, 0.4]])
    np.testing.assert_allclose(ax.collections[0].get_segments()[0], [[1.0, 0.05], [1.0, 0.2]])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x", "drift")
    handles, names = ax.get_legend_handles_labels()
    drawn = [to_hex(handle.lines[0].get_color()) for handle in handles]
    assert names == ["LoRA", "mine", "yours"]
    assert drawn[0] == plots.look("LoRA")["color"]
    assert len(set(drawn)) == 3


@pytest.mark.parametrize(("plot", "group"), [(plots.lines, "line"), (plots.scatter, "group")])
def test_a_method_looks_the_same_in_every_panel_and_is_in_the_legend_though_the_first_lacks_it(plot, group):
    rows = ROWS[ROWS.method != "LoRA"]  # `mine` alone in the first panel, `yours` alone in the second
    figure = plots.facets(pd.concat([rows, ROWS[:1]]), "task", plot, x="loss", y="drift", **{group: "method"})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["mine", "LoRA", "yours"]
    colors = {}
    for ax in figure.axes:
        for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
            drawn = handle.lines[0].get_color() if plot is plots.lines else handle.get_facecolor()[0]
            colors[name] = to_hex(drawn)
    assert len(set(colors.values())) == 3
