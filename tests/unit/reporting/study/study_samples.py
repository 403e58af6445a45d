"""Made-up results of a study, of every kind: no number here was measured."""

import math
import random

from hiplora.reporting.study.paper import paper_value
from hiplora.reporting.study.spec import Cell, Grid, Matrix, Measurement, Plot, Section, Series, Table

METHODS = ("LoRA", "Proj-LoRA", "PiSSA", "AdaLoRA", "Split-LoRA", "HiP-LoRA", "HiP-LoRA (activation)")
PROVENANCE = {
    "commit": "0123abc", "machine": {"gpu": "one H100", "cores": 16}, "recipe": "sha256:9f2c",
    "time": "2026-01-02T03:04:05"
}  # fmt: skip
TASKS = ("MMLU", "ScienceQA", "GSM8K", "HumanEval")


def measurement(**changes):
    values = {
        "protocol": "merging", "method": "LoRA", "metric": "merge_fail", "value": 61.5, "unit": "%", "domain": "all",
        "form": "addition", "low": 58.0, "high": 64.25, "seeds": 3, "items": 90, "setting": {"tau": 0.9, "size": 3},
        "jobs": ("merge-lora-1", "merge-lora-2"),
    }  # fmt: skip
    return Measurement(**(values | changes))


def table():
    rows = [
        (name, [Cell(50 + place, sd=0.4, best=place == 5), Cell(12.0 - place, low=10.5 - place, high=13 - place,
         paper=paper_value("single-task", name, "Retain")), Cell()])
        for place, name in enumerate(METHODS[:6])
    ]  # fmt: skip
    columns = ["Method", "MMLU (%)", "Retain, pp ↓", "GSM8K"]
    return Table("single-task", "Scores & retention, single task", columns, rows,
                 "Mean ± standard deviation over 3 seeds; [low, high] is a 95 % interval.")  # fmt: skip


def wide_table():
    columns = ["Method", *(f"{task} {when}" for task in TASKS for when in ("before", "after", "Δ (pp)"))]
    rows = [
        (name, [Cell(60 - place + spot, sd=1.1) for spot in range(12)]) for place, name in enumerate(METHODS)
    ]
    return Table("merging", "Before and after a merge of four", columns, rows)


def lines_plot(name="tau"):
    xs = [0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
    series = []
    for place, method in enumerate(METHODS):
        ys = [100 / (1 + math.exp(8 * (0.6 + 0.05 * place - x))) for x in xs]
        series.append(Series(method, xs, ys, [y - 4 for y in ys], [y + 4 for y in ys]))
    series.append(Series("LoRA", [0.9], [62.0], paper=True))
    series.append(Series("HiP-LoRA (paper)", [0.9], [6.8], paper=True))
    return Plot(name, "MergeFail against the threshold", "threshold τ", "merges that fail, %", series)


def curve_plot():
    grid = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    ours = Series("HiP-LoRA", [11, 8.2, 5.6, 4.4, 4.1], [70.5, 70.9, 70.4, 69.2, 67.9],
                  [70, 70.3, 69.9, 68.7, 67.4], [71, 71.4, 70.9, 69.8, 68.5], [10, 7.6, 5, 4, 3.7],
                  [12, 8.9, 6.3, 4.9, 4.5], [f"λ = {value:g}" for value in grid])  # fmt: skip
    others = [
        Series(name, [x], [y], labels=[name]) for name, x, y in (("LoRA", 12.1, 70.2), ("PiSSA", 9.9, 70.6))
    ]
    return Plot(
        "lambda", "Score against what is lost elsewhere, along λ", "Retain, pp", "score, %", [ours, *others]
    )


def loss_plot():
    steps = list(range(0, 2000, 20))
    series = [
        Series(name, steps, ys := [1.1 + place / 10 + 2 * math.exp(-x / (200 + 80 * place)) for x in steps],
               [y * 0.95 for y in ys], [y * 1.05 for y in ys])
        for place, name in enumerate(("HiP-LoRA", "without budget", "without projection", "Zero init"))
    ]  # fmt: skip
    return Plot(
        "loss",
        "Loss while training, with the band of three seeds",
        "step",
        "training loss",
        series,
        y_log=True,
    )


def cloud(name, title, seed):
    rng = random.Random(seed)
    sigma = [10 ** rng.uniform(-0.5, 2) for _ in range(2000)]
    delta = [1e-3 * value ** (0.5 - 0.3 * seed) * 10 ** rng.gauss(0, 0.3) for value in sigma]
    return Plot(
        name,
        title,
        "singular value σ",
        "|δ|",
        [Series(title, sigma, delta)],
        "points",
        x_log=True,
        y_log=True,
    )


def spectrum():
    names = ("HiP-LoRA", "LoRA", "PiSSA")
    parts = [cloud(f"spectrum-{place}", name, place) for place, name in enumerate(names)]
    return Grid("spectrum", "How far each gain moves", parts, "One dot a direction.")


def matrix(name="continual", shift=0.0):
    values = [
        [62.1 + shift - row * 2 + column * 3 if column <= row else None for column in range(4)]
        for row in range(4)
    ]
    return Matrix(
        name, "HiP-LoRA", [f"{row + 1} (+{task})" for row, task in enumerate(TASKS)], TASKS, values, "%"
    )


def matrices():
    parts = [matrix(f"m{place}", -6 * place) for place in range(4)]
    return Grid("continual", "Scores after each stage", parts, "Rows: after which stage.")


def sections():
    every = [measurement(method=name, value=60.0 - place) for place, name in enumerate(METHODS)]
    return [
        Section("single-task", "Single-task adaptation", ("HiP-LoRA loses least elsewhere.", "More words."), [table()],
                [curve_plot(), loss_plot()], every),
        Section("merging", "Merging", ("LoRA's merges fail most.",), [wide_table()], [lines_plot()], (),
                [f"merge-{place}" for place in range(12)]),
        Section("continual", "Continual tuning", ("What was learned first is kept.",), (), [matrices(), matrix("one")]),
        Section("spectrum", "Spectral allocation", (), (), [spectrum()], (), ["probe-1", "probe-2"]),
        Section("editing", "Editing", missing=["edit-lora-42"]),
    ]  # fmt: skip
