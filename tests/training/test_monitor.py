"""A run that hangs ends in a line within the stated time; one that moves does not."""

from __future__ import annotations

import time

from lm.training.monitor import watchdog


def test_silence_ends_the_process_and_says_since_when(capsys):
    ends: list[int] = []
    with watchdog(0.2, ends.append) as beat:
        beat("step 12")
        time.sleep(1.0)
    assert ends == [1]
    assert "nothing happened for 0.2 s since step 12" in capsys.readouterr().err


def test_beats_keep_it_quiet_and_zero_watches_nothing(capsys):
    ends: list[int] = []
    with watchdog(0.4, ends.append) as beat:
        for step in range(10):
            beat(f"step {step}")
            time.sleep(0.08)
    with watchdog(0.0, ends.append) as beat:
        beat("step 1")
    assert ends == []
    assert capsys.readouterr().err == ""
