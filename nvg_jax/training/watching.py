"""Where the time of a training goes, the memory of its devices, and a trace of some steps."""

import contextlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from etils import epath

from nvg_jax.runtime.storage import in_bucket

ACTIVITIES: tuple[str, ...] = ("data", "compiling", "saving", "evaluating")


class Clock:
    """Measures the shares of time in steps and in everything else that a training does.

    Steps take the time that no other activity takes: they run on the devices while the loop goes
    on, and "data" is how long the loop waited for a batch, also while a step was running.
    """

    def __init__(self):
        self._seconds = dict.fromkeys(ACTIVITIES, 0.0)  # since the start
        self._reported = self._seconds.copy()  # until the last report
        self._start = self._last = time.monotonic()

    @contextlib.contextmanager
    def timed(self, activity: str):
        """Counts the time inside for one of `ACTIVITIES`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._seconds[activity] += time.monotonic() - start

    def shares(self) -> dict[str, float]:
        """{activity: its share of the time since the start}, with "steps"; they add up to 1."""
        return shares(self._seconds, time.monotonic() - self._start)

    def report(self) -> dict[str, float]:
        """The shares as metrics, since the last call and since the start."""
        now = time.monotonic()
        recent = {name: self._seconds[name] - self._reported[name] for name in ACTIVITIES}
        recent = shares(recent, now - self._last)
        self._reported, self._last = self._seconds.copy(), now
        metrics = {f"goodput/{name}": share for name, share in recent.items()}
        return metrics | {f"goodput_total/{name}": share for name, share in self.shares().items()}


def shares(seconds: dict[str, float], total: float) -> dict[str, float]:
    others = {name: seconds[name] / max(total, 1e-9) for name in ACTIVITIES}
    return {"steps": 1 - sum(others.values()), **others}


def memory_in_use() -> dict[str, float]:
    """GiB in use on the fullest device of this process, now and at most; {} where unknown."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    names = {"bytes_in_use": "device_memory_gib", "peak_bytes_in_use": "device_memory_peak_gib"}
    return {
        name: max(each[key] for each in stats if each) / 2**30
        for key, name in names.items()
        if any(each and key in each for each in stats)
    }


class Profiler:
    """Traces the steps first .. last of a training for XProf and TensorBoard, if it takes them.

    Args:
        folder: where the trace goes, below plugins/profile/.
        steps: (first, last), counted from 1; () for no trace.
    """

    def __init__(self, folder: epath.Path, steps: Sequence[int]):
        self._folder, self._steps, self._traced = folder, tuple(steps), None
        self._local: tempfile.TemporaryDirectory | None = None

    def before(self, step: int):
        if self._steps and step == self._steps[0]:
            self._local = tempfile.TemporaryDirectory() if in_bucket(self._folder) else None
            self._traced = self._local.name if self._local else str(self._folder)
            jax.profiler.start_trace(self._traced)

    def after(self, step: int, result):
        """Ends the trace after its last step, when `result` of that step is there."""
        if self._traced and step == self._steps[1]:
            jax.block_until_ready(result)
            self.close()

    def close(self):
        if not self._traced:
            return
        jax.profiler.stop_trace()
        if self._local:
            for path in Path(self._traced).rglob("*"):
                if path.is_file():
                    target = self._folder / path.relative_to(self._traced).as_posix()
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(path.read_bytes())
            self._local.cleanup()
        self._traced = None
