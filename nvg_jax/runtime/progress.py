"""Progress lines for long-running work: how much is done, the rate, and the time remaining."""

import datetime
import logging
import time

from nvg_jax.runtime import heartbeat, watchdog

logger = logging.getLogger("nvg_jax")


class Progress:
    """Logs lines such as "tokenizer: 120/800 steps  loss 0.21  3.2 steps/s  ETA 0:03:32".

    The clock starts with the first update: the work before it includes compilation, and its line
    shows no rate.

    Args:
        name: what is running.
        total: the number of items to do, including those done in an earlier run.
        unit: the name of the items, in the plural.
        interval: seconds between lines; updates in between are silent. The last item is always
            reported.
    """

    def __init__(self, name: str, total: int, unit: str, interval: float = 10.0):
        self._name, self._total, self._unit, self._interval = name, total, unit, interval
        self._first = None  # (items done, time) at the first update
        self._shown = -float("inf")

    def update(
        self, done: int, details: str = "", remaining: float | None = None, covers: str = ""
    ):
        """Reports that `done` items are finished, with details such as losses.

        Args:
            remaining: the seconds left, if more is known about them than the rate.
            covers: what these seconds are of, if not of this work alone.
        """
        watchdog.reset(slow=True)
        heartbeat.again()
        now = time.monotonic()
        self._first = self._first or (done, now)
        if now - self._shown < self._interval and done < self._total:
            return
        self._shown = now
        parts = [f"{self._name}: {done}/{self._total} {self._unit}", details]
        first, start = self._first
        if done > first and now > start:
            rate = (done - first) / (now - start)
            left = (self._total - done) / rate if remaining is None else remaining
            eta = f"ETA {datetime.timedelta(seconds=round(left))} {covers}".rstrip()
            parts += [f"{rate:.3g} {self._unit}/s", eta]
        logger.info("%s", "  ".join(part for part in parts if part))
