import math
import re
import xml.etree.ElementTree as ET

import pytest

from hiplora.reporting._old_plots import energy, learning, spectrum
from hiplora.reporting.canvas import inline_svg, plate_files
from hiplora.reporting.page import inspection_plates, overview, plates
from hiplora.reporting.palette import LOOKS, NEUTRALS, PAPER, looks
from hiplora.reporting.results import ModuleUpdate, read_inspection, read_results
from tests.unit.reporting import report_samples as samples

SVG = "{http://www.w3.org/2000/svg}"


def update(module="m", layer=0, type="q_proj", norm=1.0, left=0.5, right=0.5, both=0.5, sigma=(), gains=()):
    return ModuleUpdate(module, layer, type, norm, left, right, both, sigma, gains)


def small(**changes):
    """A comparison with two layers, quick to draw."""
    raw = samples.compare_results(**changes)
    for name in list(raw["methods"]):
        raw["methods"][name]["allocation"] = samples.allocation(name, 2, 8)
    return raw


def luminance(colour):
    channels = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_a_share_is_weighted_by_energy_and_ignores_a_zero_update():
    rows = [update(norm=3.0, left=0.1), update(norm=1.0, left=0.9), update(norm=0.0, left=1.0)]
    assert energy.share(rows, "left") == pytest.approx((9 * 0.1 + 0.9) / 10)
    assert energy.share([update(norm=0.0)], "left") is None
    assert energy.share([update(norm=None, left=0.2), update(norm=None, left=0.4)], "left") == pytest.approx(
        0.3
    )
    assert energy.share([update(left=math.nan), update(left=None)], "left") is None
    assert energy.norm(rows) == pytest.approx(math.sqrt(10))


def test_energy_on_both_sides_is_counted_once():
    assert energy.share([update(left=0.3, right=0.2, both=0.1)], "touched") == pytest.approx(0.4)
    assert energy.share([update(left=0.3, right=None, both=0.1)], "touched") is None


def test_module_types_come_in_the_usual_order():
    rows = [update(type=kind) for kind in ("down_proj", "lm_head", "o_proj", "q_proj", "dense")]
    assert spectrum.types_of(rows) == ["q_proj", "o_proj", "down_proj", "dense", "lm_head"]


def test_gains_pair_with_their_singular_values_and_gaps_fall_out():
    row = update(sigma=(4.0, 2.0, 0.0, None, 1.0), gains=(-0.4, None, 1.0, 1.0, math.inf))
    assert spectrum.gain_points([row], "q_proj") == [(4.0, 0.4)]
    assert spectrum.relative_gains([row], "q_proj") == [pytest.approx(0.1)]
    assert spectrum.gain_points([row], "k_proj") == []


def test_a_crowded_cloud_is_thinned_along_the_whole_spectrum():
    points = [(float(index), 1.0) for index in range(1, 50_001)]
    kept = spectrum.thin(points)
    assert len(kept) == 1500
    assert kept[0][0] == 1.0
    assert kept[-1][0] > 49_900


def test_a_caption_says_what_is_not_drawn():
    rows = [update(type=f"t{n}", sigma=(2.0, 1.0) * 800, gains=(0.1, 0.2) * 800) for n in range(10)]
    plate = spectrum.plate({"LoRA": rows}, looks(["LoRA"]))
    assert plate is not None
    assert len(plate.panels) == 8
    assert "Of more than 1,500 dots, 1,500 are drawn" in plate.caption
    assert plate.caption.endswith("Not shown: t8, t9.")


@pytest.mark.parametrize(
    ("low", "high", "places"),
    [
        (0.8, 1.2e4, [1, 10, 100, 1000, 1e4]),
        (1.2, 21.0, [2, 5, 10, 20]),
        (0.5, 30.0, [1, 3, 10, 30]),
        (0.21, 0.37, [0.25, 0.3, 0.35]),
        (3.0, 3.2, [3.0, 3.05, 3.1, 3.15, 3.2]),
        (1e-12, 1.0, [1e-12, 1e-9, 1e-6, 1e-3, 1]),
    ],
)
def test_a_logarithmic_axis_has_a_few_round_ticks(low, high, places):
    assert spectrum.log_places(low, high) == pytest.approx(places)


def test_smoothing_keeps_a_constant_and_passes_over_gaps():
    assert learning.smooth([2.0] * 50, 3.0) == pytest.approx([2.0] * 50)
    assert learning.smooth([1.0, math.nan, 1.0], 1.0) == pytest.approx([1.0, 1.0, 1.0])
    step = learning.smooth([0.0] * 30 + [1.0] * 30, 2.0)
    assert step == sorted(step)
    assert 0.3 < step[30] < 0.7


def test_a_method_keeps_its_colour_whatever_stands_beside_it():
    alone, among = looks(["HiP-LoRA"]), looks(["PiSSA", "something", "LoRA", "hip_lora"])
    assert alone["HiP-LoRA"] == among["hip_lora"]
    assert looks(["LoRA"])["LoRA"] == among["LoRA"]
    assert len({look.colour for look in among.values()}) == 4
    together = ["HiP-LoRA (activation)", "LoRA on the MLPs", "Proj-LoRA (OPLoRA)", "HiP-LoRA", "LoRA"]
    assert all(looks([name])[name] == look for name, look in looks(together).items())
    many = looks([f"method {index}" for index in range(20)])
    assert len(many) == 20


def test_every_method_can_be_told_from_the_page_and_from_the_next_method():
    night = NEUTRALS[PAPER]
    for look in LOOKS:
        assert contrast(look.colour, PAPER) >= 3, look
        assert contrast(look.dark, night) >= 3, look
    assert len({look.dashes for look in LOOKS}) == len({look.marker for look in LOOKS}) == len(LOOKS)
    assert contrast("#5a6373", PAPER) >= 4.5
    assert contrast(NEUTRALS["#5a6373"], night) >= 4.5


def test_a_panel_is_an_accessible_picture_that_shares_no_id_and_no_style_with_the_page():
    panels = [panel for plate in plates(read_results(small())) for panel in plate.panels]
    ids: list[str] = []
    for index, panel in enumerate(panels):
        svg = inline_svg(panel, f"p{index}")
        root = ET.fromstring(svg)
        assert root.get("role") == "img"
        label = {
            element.get("id"): element.text
            for element in root.iter()
            if element.tag in (f"{SVG}title", f"{SVG}desc")
        }
        assert list(label) == root.get("aria-labelledby", "").split()
        assert all(label.values())
        assert root.find(f".//{SVG}style") is None
        assert root.get("width") is None
        assert root.find(f".//{SVG}text") is not None, "letters must stay text, not outlines"
        used = [value[1:] for e in root.iter() for key, value in e.attrib.items() if key.endswith("href")]
        own = [element.get("id") for element in root.iter() if element.get("id")]
        assert set(used) <= set(own)
        ids += own
    assert len(ids) == len(set(ids))


def test_every_colour_of_a_picture_follows_the_page():
    for plate in plates(read_results(small())):
        for panel in plate.panels:
            themed = re.sub(r"var\(--c([0-9a-f]{6}),#\1\)", "", inline_svg(panel, "x"))
            assert re.findall(r"#[0-9a-fA-F]{6}\b", themed) == [], panel.name


def test_the_words_of_a_picture_carry_its_numbers():
    found = {
        panel.name: panel.description for plate in plates(read_results(small())) for panel in plate.panels
    }
    assert "built-in prose: LoRA 0.0810, HiP-LoRA 0.0124" in found["drift-kl"]
    assert "before training 2.414, LoRA 1.412, HiP-LoRA 1.427." in found["loss-heldout"]


def test_names_are_shown_as_they_are_not_as_markup():
    raw = small()
    raw["methods"]["LoRA"]["drift"] = {
        "$x_1$ & <b>": {"kl": 0.1, "perplexity_ratio": 1.2},
        "日本": {"kl": 0.2},
    }
    panel = next(
        panel for plate in plates(read_results(raw)) for panel in plate.panels if panel.name == "drift-kl"
    )
    texts = [element.text for element in ET.fromstring(inline_svg(panel, "x")).iter(f"{SVG}text")]
    assert "$x_1$ & <b>" in texts
    assert "日本" in texts


def test_what_was_not_measured_has_no_picture():
    assert plates(read_results({"schema": 1, "kind": "demo"})) == []
    raw = small()
    for method in raw["methods"].values():
        method["drift"], method["allocation"] = {}, []
    assert [plate.name for plate in plates(read_results(raw))] == ["loss"]


def test_a_method_without_a_value_keeps_its_row_and_says_so():
    raw = small()
    raw["methods"]["HiP-LoRA"]["drift"]["built-in code"]["kl"] = math.nan
    panel = next(
        panel for plate in plates(read_results(raw)) for panel in plate.panels if panel.name == "drift-kl"
    )
    texts = [element.text for element in ET.fromstring(inline_svg(panel, "x")).iter(f"{SVG}text")]
    assert texts.count("not measured") == 1
    assert "built-in code: LoRA 0.121, HiP-LoRA not measured" in panel.description


@pytest.mark.parametrize("value", [0.0, -1e-9, math.inf, 1e30, 1e-30])
def test_odd_values_draw_without_a_warning(value, recwarn):
    raw = small()
    for method in raw["methods"].values():
        method["heldout_loss_after"] = value
        method["curve"] = [{"step": 1, "loss": value}]
        method["drift"] = {"text": {"kl": value, "perplexity_ratio": value}}
        for row in method["allocation"]:
            row |= {"norm": value, "left": value, "right": value, "both": value, "gains": [value] * 8}
    for plate in plates(read_results(raw)):
        for panel in plate.panels:
            inline_svg(panel, "x")
    assert [str(warning.message) for warning in recwarn] == []


def test_a_saved_plate_is_the_same_bytes_each_time_and_carries_its_legend():
    plate = next(plate for plate in plates(read_results(small())) if plate.name == "drift")
    first, second = plate_files(plate, ("svg", "png")), plate_files(plate, ("svg", "png"))
    assert first == second
    assert first["png"].startswith(b"\x89PNG")
    root = ET.fromstring(first["svg"])
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert texts[:2] == ["LoRA", "HiP-LoRA"]
    assert b"var(" not in first["svg"]
    assert b"matplotlib.org" not in first["svg"]


def test_the_overview_shows_gain_beside_cost():
    assert [panel.name for panel in overview(read_results(small()))[0].panels] == [
        "loss-curves",
        "overview-kl",
    ]
    demo = overview(read_results(samples.demo_results()))[0]
    assert [panel.name for panel in demo.panels] == ["edits-success", "overview-kl"]
    assert overview(read_results({"schema": 1, "kind": "compare"})) == []


def test_an_inspection_labels_bars_by_module_type():
    raw = samples.inspection(modules=samples.allocation("LoRA", 2, 8))
    plate = next(plate for plate in inspection_plates(read_inspection(raw)) if plate.name == "types")
    assert plate.panels[0].description.startswith("q_proj ")
