"""Progress in a log."""

from __future__ import annotations

import time

import pytest
from tqdm import TMonitor, tqdm

from pipeline.utils.progress import PlainLines, progress_bar


def test_progress_in_a_log_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    lines = PlainLines()
    for drawn in ("\r", "\rcaptioning: 5 of 30 images   ", "", "\n"):
        lines.write(drawn)
    assert capsys.readouterr().err == "captioning: 5 of 30 images\n"


def test_no_line_is_repeated_in_a_log_while_nothing_happens(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress_bar(total=9) as bar:
        bar.start_t, bar.last_print_t = bar.start_t - 60, bar.last_print_t - 60
        bar.update(6)
        bar.last_print_t -= 60  # as seen by tqdm's monitor, which looks every 10 seconds
        monitor = TMonitor(tqdm, 0.05)
        time.sleep(0.3)
        monitor.exit()
    assert capsys.readouterr().err.count("6 of 9") == 1
