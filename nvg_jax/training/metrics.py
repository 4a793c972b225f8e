"""The reports of a training: averaged metrics, codebook usage, progress lines, TensorBoard."""

import logging
import time
from typing import Any

import jax
import numpy as np
from etils import epath, epy
from jax.experimental import multihost_utils

from nvg_jax.errors import UserError, reported
from nvg_jax.runtime import heartbeat
from nvg_jax.runtime.processes import is_main
from nvg_jax.runtime.progress import Progress
from nvg_jax.tokenizer import codebook_usage
from nvg_jax.visualize import png

with epy.lazy_imports():  # imports TensorFlow, which takes seconds
    from clu import metric_writers

logger = logging.getLogger("nvg_jax")


class Reporter:
    """Logs the progress of one part and, on process 0, writes its metrics and pictures.

    `close` closes the event file.
    """

    def __init__(self, part: str, folder: epath.Path, start: int, steps: int, batch_size: int):
        writers = [metric_writers.SummaryWriter(str(folder))] if is_main() else []
        self._writer = metric_writers.MultiWriter(writers)
        self._part, self._folder, self._batch_size = part, folder, batch_size
        self._start, self._steps, self._losses = start, steps, {}
        self._progress = Progress(part, steps, "steps", interval=0)
        self._window = []  # the metrics of the steps since the last line
        self._assessed = folder / "assessed.txt"
        if start:
            state = "finished" if start >= steps else "resuming"
            logger.info("%s: %s at step %d of %d", part, state, start, steps)
        self._beat(start)

    def close(self):
        self._writer.close()

    def _beat(self, step: int):
        more = {"steps": self._steps, "loss": self._losses}
        heartbeat.beat(self._folder.parent, self._part, self._start, step, **more)

    def start_step(self):
        """Restarts the timer at the first step after a report, so that saving is not timed."""
        if not self._window:
            self._window_started = time.monotonic()

    def add(self, metrics: dict[str, Any]):
        """Adds the metrics of a step; they stay on the devices until the next line."""
        self._window.append(metrics)

    def progress(self, step: int, learning_rate: float):
        """Writes the mean metrics since the last call.

        Raises:
            UserError: a metric is not finite.
        """
        scalars = summarize(jax.device_get(self._window), self._part, step)
        rate = len(self._window) / (time.monotonic() - self._window_started)
        scalars["images_per_second"] = rate * self._batch_size
        scalars["learning_rate"] = learning_rate
        self._writer.write_scalars(step, scalars)
        self._losses = {k: v for k, v in scalars.items() if k.endswith("loss")}
        self._progress.update(step, "  ".join(f"{k} {v:.4g}" for k, v in self._losses.items()))
        self._beat(step)
        self._window = []

    def evaluation(self, step: int, metrics: dict[str, Any], picture: np.ndarray | None):
        """Writes metrics on held-out data and a picture."""
        scalars = {f"test_{name}": value for name, value in flatten(metrics).items()}
        self._writer.write_scalars(step, scalars)
        shown = (f"{k} {v:.4g}" for k, v in scalars.items() if not k.split("/")[-1].isdigit())
        logger.info("%s: %d  held out: %s", self._part, step, "  ".join(shown))
        self._beat(step)
        if picture is not None and is_main():
            path = self._folder / f"pictures_{step:07d}.png"
            with reported(f"{path} cannot be written"):
                path.write_bytes(png(picture))
            self._writer.write_images(step, {"pictures": picture[None]})

    @property
    def last_assessed(self) -> int:
        """The step of the last call of `assessed` in this folder, on every process; 0 without one.

        Collective: every process must read it.
        """
        step = 0
        if is_main() and self._assessed.exists():
            step = int(self._assessed.read_text() or 0)
        return int(multihost_utils.broadcast_one_to_all(np.array(step)))

    def assessed(self, step: int):
        """Notes that the model of this step has been evaluated, for a run that is resumed there."""
        if is_main():
            self._assessed.write_text(str(step))

    def fid(self, step: int, fid: float, best: float):
        """Writes the FID of the model at this step; `best` is the lowest one so far."""
        self._writer.write_scalars(step, {"fid": fid})
        logger.info("%s: %d  FID %.4g  (best so far: %.4g)", self._part, step, fid, best)
        self._beat(step)


def summarize(window: list[dict[str, Any]], part: str, last_step: int) -> dict[str, float]:
    """Mean metrics of the steps up to `last_step`; codebook usage over all of them.

    Raises:
        UserError: a metric is not finite; the message names the step and the metric.
    """
    for step, metrics in enumerate(window, last_step - len(window) + 1):
        values = flatten(metrics)
        for name in sorted(values, key=lambda name: "_loss" not in name):  # losses first
            if not np.isfinite(values[name]):
                raise UserError(
                    f"{part}: {name} is {values[name]} at step {step}. Training stopped; the last "
                    "checkpoint is from before it. A lower learning rate or clip, or "
                    "--config.dtype=float32, usually helps."
                )
    means = {}
    for name in window[0]:
        values = np.stack([metrics[name] for metrics in window])
        if name == "code_counts":
            means |= codebook_usage(values.sum(0))
        else:
            means[name] = values.mean(0)
    return flatten(means)


def flatten(metrics: dict[str, Any]) -> dict[str, float]:
    """Flattens metrics, some with one value per stage, to scalars; leaves out code counts."""
    scalars = {}
    for name, value in metrics.items():
        if name == "code_counts":
            continue
        value = np.asarray(value)
        if value.ndim == 0:
            scalars[name] = float(value)
        else:
            scalars.update({f"{name}/{stage}": float(v) for stage, v in enumerate(value)})
    return scalars
