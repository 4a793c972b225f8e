"""The progress line, with a clock set by hand."""

import time

from nvg_jax.runtime.progress import Progress


def test_the_line_shows_the_rate_after_the_first_update_and_the_time_left(monkeypatch, caplog):
    caplog.set_level("INFO", "nvg_jax")
    progress = Progress("sampling", 100, "samples", interval=10)
    # 20 samples while compiling, then 2 a second; updates within ten seconds are silent.
    for now, done in ((50, 20), (55, 30), (60, 40), (65, 50), (90, 100)):
        monkeypatch.setattr(time, "monotonic", lambda: now)
        progress.update(done, *(["loss 0.5", None, "with pictures"] if done == 40 else []))
    assert [record.getMessage() for record in caplog.records] == [
        "sampling: 20/100 samples",
        "sampling: 40/100 samples  loss 0.5  2 samples/s  ETA 0:00:30 with pictures",
        "sampling: 100/100 samples  2 samples/s  ETA 0:00:00",
    ]
