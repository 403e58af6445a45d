"""The progress bar: loss, speed and time left where someone watches, silence elsewhere."""

import sys

import pytest

from hiplora.training.progress import TrainingBar

ROW = {"step": 3, "steps": 10, "loss": 1.23456, "tokens_per_second": 1234.5}


class Terminal:
    """A stderr that says it is a terminal."""

    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)

    def flush(self):
        pass

    def isatty(self):
        return True


def test_nothing_but_notes_is_written_where_nobody_watches(capsys):
    with TrainingBar("train") as bar:
        bar.phase("loading the model")
        bar(ROW)
        bar.note("carrying on from step 3")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "train: carrying on from step 3\n"


def test_a_terminal_sees_phases_loss_speed_and_time_left(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with TrainingBar("train") as bar:
        bar.phase("loading [the] model")
        bar(ROW)
    assert "loading [the] model" in terminal.text
    assert "loss 1.235" in terminal.text
    assert "1,234 tokens/s" in terminal.text
    assert "3/10" in terminal.text


def test_a_row_without_a_loss_draws_nothing():
    with TrainingBar() as bar:
        bar({"step": 0, "steps": 10, "held_out_loss": 2.0})


def test_the_terminal_is_left_in_order_after_an_error(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(KeyboardInterrupt), TrainingBar("train") as bar:
        bar(ROW)
        raise KeyboardInterrupt
    assert terminal.text.rstrip().endswith("\x1b[?25h")  # the cursor is back
