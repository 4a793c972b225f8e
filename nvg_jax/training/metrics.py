"""The reports of a training: averaged metrics, codebook usage, progress lines, TensorBoard."""

import contextlib
import functools
import io
import logging
import os
import re
import socket
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2
from tensorboard.plugins.image import metadata as image_plugin
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from nvg_jax.errors import UserError, reported
from nvg_jax.parts import PARTS
from nvg_jax.runtime import heartbeat
from nvg_jax.runtime.processes import from_main, is_main
from nvg_jax.runtime.progress import Progress
from nvg_jax.runtime.storage import in_bucket, write_file
from nvg_jax.tokenizer import codebook_usage
from nvg_jax.training.forecast import Forecast
from nvg_jax.training.run import Run
from nvg_jax.training.state import FAR_ABOVE
from nvg_jax.training.trainer import Trainer
from nvg_jax.training.watching import Clock, memory_in_use
from nvg_jax.training.weights_and_biases import WandbWriter
from nvg_jax.visualize import png, save_png

logger = logging.getLogger("nvg_jax")

# Protocol buffers get their classes when they are imported, where a type checker sees none.
Event: Any = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]
SessionLog: Any = event_pb2.SessionLog  # pyright: ignore[reportAttributeAccessIssue]
Summary: Any = summary_pb2.Summary  # pyright: ignore[reportAttributeAccessIssue]
TensorProto: Any = tensor_pb2.TensorProto  # pyright: ignore[reportAttributeAccessIssue]
FLUSH_SECONDS = 120
STEPS_IN_FLIGHT = 2  # besides the last one; enough that the devices never wait for the host
EVENTS = "events.out.tfevents."  # how the names of the files begin


class EventWriter:
    """Writes TensorBoard's event files, without TensorFlow. Only process 0 writes.

    On a disk, one file grows. Objects in a bucket cannot grow, so every flush makes another one;
    TensorBoard reads the files of a folder in the order of their names.
    """

    def __init__(self, folder: epath.Path):
        seconds = int(time.time())
        if is_main():  # later than the others, whatever the clock of their machine said
            earlier = (re.match(EVENTS + r"(\d+)", path.name) for path in folder.glob("*tfevents*"))
            seconds = max([seconds, *(int(found[1]) + 1 for found in earlier if found)])
        name = f"{EVENTS}{seconds}.{socket.gethostname()}.{os.getpid()}"
        self._path, self._in_bucket = folder / name, in_bucket(folder)
        self._buffer, self._flushed, self._flushes, self._size = io.BytesIO(), 0.0, 0, 0
        self._records = RecordWriter(self._buffer)

    def write_scalars(self, step: int, scalars: Mapping[str, float]):
        for tag, value in scalars.items():
            self._add(step, scalar_pb(tag, value))

    def write_images(self, step: int, images: Mapping[str, np.ndarray]):
        """Writes pictures, uint8 (H, W, 3)."""
        for tag, image in images.items():
            height, width, _ = image.shape
            content = [str(width).encode(), str(height).encode(), png(image)]
            shape = {"dim": [{"size": len(content)}]}
            tensor = TensorProto(dtype="DT_STRING", tensor_shape=shape, string_val=content)
            plugin = image_plugin.create_summary_metadata(None, None)
            value = Summary.Value(tag=tag, metadata=plugin, tensor=tensor)
            self._add(step, Summary(value=[value]))

    def write_texts(self, step: int, texts: Mapping[str, str]):
        """Writes Markdown."""
        for tag, text in texts.items():
            self._add(step, text_pb(tag, text))

    def begin(self, step: int):
        """Tells TensorBoard that a process begins at this step.

        If another one had begun before, it forgets what that one wrote of this step and later ones.
        """
        log = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=step, session_log=log))

    def flush(self):
        """Writes what is buffered; after a failure that may pass, it is tried again later."""
        if not self._buffer.tell():
            return
        path, self._flushed = self._path, time.monotonic()
        try:
            if self._in_bucket:
                path = path.with_name(f"{path.name}.{self._flushes:06d}")
                write_file(path, self._buffer.getvalue())
            else:
                with reported(f"{path} cannot be written"):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with path.open("ab") as file:
                        file.truncate(min(file.tell(), self._size))  # a failure leaves half of it
                        file.write(self._buffer.getvalue())
        except UserError:
            raise
        except Exception as error:  # libraries for buckets raise errors of many kinds
            logger.warning("%s cannot be written now: %s", path, error)
            return
        self._size += self._buffer.tell()
        self._buffer.seek(0)
        self._buffer.truncate()
        self._flushes += 1

    def _add(self, step: int, summary: Any):
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def _write(self, event: Any):
        if not is_main():
            return
        if not self._buffer.tell() and (self._in_bucket or not self._flushes):
            version = Event(wall_time=time.time(), file_version="brain.Event:2")
            self._records.write(version.SerializeToString())
        self._records.write(event.SerializeToString())
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()


class Reporter:
    """Logs the progress of one part and, on process 0, writes its metrics and pictures.

    `close` writes what is left.
    """

    def __init__(self, trainer: Trainer, run: Run, start: int, forecast: Forecast | None = None):
        """
        Args:
            start: the step that the training goes on from.
            forecast: of the whole run, for the time that is left.
        """
        part, steps = trainer.part.name, trainer.steps
        folder, project = run.workdir / part, run.config.wandb_project
        self._events = EventWriter(folder)
        self._writers: list[EventWriter | WandbWriter] = [self._events]
        self._assessed = folder / "assessed.txt"
        unfinished = start < steps or self.last_assessed < steps
        if project and unfinished and is_main():
            self._writers.append(WandbWriter(project, folder, run.config_json()))
        self._forecast = forecast or Forecast([])
        self._part, self._folder, self._recipe = part, folder, trainer.recipe
        self._start, self._steps, self._losses = start, steps, {}
        self._progress = Progress(part, steps, "steps", interval=0)
        self._window = []  # the metrics of the steps since the last line
        self.clock = Clock()
        self._compiled, self._warm, self._marked = False, False, time.monotonic()
        if start:
            state = "finished" if start >= steps else "resuming"
            logger.info("%s: %s at step %d of %d", part, state, start, steps)
        if start < steps:
            self._events.begin(start + 1)
        self._beat(start)

    def close(self):
        self._write("flush")

    def _write(self, method: str, *arguments):
        for writer in self._writers:
            getattr(writer, method)(*arguments)

    def _beat(self, step: int):
        more = {"steps": self._steps, "loss": self._losses}
        heartbeat.beat(self._folder.parent, self._part, self._start, step, **more)

    def start_step(self):
        """Restarts the timer at the first step after a report, so that saving is not timed."""
        if not self._window:
            self._window_started = time.monotonic()
        if not self._compiled:
            logger.info("%s: compiling the step (about a minute)", self._part)
            self._compiled = True

    def add(self, metrics: dict[str, Any]):
        """Adds the metrics of a step; they stay on the devices until the next line.

        Waits for an earlier step: every step that is queued holds its batch in the devices' memory,
        and has to end before a preempted run can save.
        """
        self._window.append(metrics)
        if len(self._window) > STEPS_IN_FLIGHT:
            jax.block_until_ready(self._window[-1 - STEPS_IN_FLIGHT])

    def progress(self, step: int, learning_rate: float, checkpoint: int | None):
        """Writes the mean metrics since the last call.

        Args:
            checkpoint: the step of the last checkpoint, if there is one.

        Raises:
            UserError: a metric is not finite, or too many steps in a row were left out.
        """
        window = jax.device_get(self._window)
        check_steps(window, self._part, step, self._recipe.max_skipped_steps, checkpoint)
        scalars = summarize(window)
        rate = len(self._window) / (time.monotonic() - self._window_started)
        if self._warm:
            self._forecast.measured(self._part, "step", 1 / rate)
        else:  # the first steps include compilation
            self._forecast.measured(self._part, "compilation", len(self._window) / rate)
        self._warm = True
        scalars["images_per_second"] = rate * self._recipe.batch_size
        scalars["learning_rate"] = learning_rate
        scalars |= self.clock.report() | memory_in_use()
        self._write("write_scalars", step, scalars)
        self._losses = {k: v for k, v in scalars.items() if k.endswith("loss")}
        shown = self._losses | {k: v for k, v in scalars.items() if k == "skipped_steps" and v}
        self._progress.update(
            step,
            "  ".join(f"{k} {v:.4g}" for k, v in shown.items()),
            self._forecast.remaining(self._part, step),
            self._forecast.covers(self._part, step),
        )
        self._beat(step)
        self._window, self._marked = [], time.monotonic()

    def evaluation(self, step: int, metrics: dict[str, Any], picture: np.ndarray | None):
        """Writes metrics on held-out data and a picture."""
        self._took("evaluation")
        scalars = {f"test_{name}": value for name, value in flatten(metrics).items()}
        self._write("write_scalars", step, scalars)
        shown = (f"{k} {v:.4g}" for k, v in scalars.items() if not k.split("/")[-1].isdigit())
        logger.info("%s: %d  held out: %s", self._part, step, "  ".join(shown))
        self._beat(step)
        if picture is not None and is_main():
            path = self._folder / f"pictures_{step:07d}.png"
            save_png(path, picture)
            self._write("write_images", step, {"pictures": picture})

    def _took(self, kind: str):
        """Notes the time since the last report."""
        now = time.monotonic()
        self._forecast.measured(self._part, kind, now - self._marked)
        self._marked = now

    @functools.cached_property
    def last_assessed(self) -> int:
        """The step of the last call of `assessed` in this folder before this process; 0 if none.

        Collective: every process must read it, before it calls `assessed`.
        """
        step = 0
        if is_main() and self._assessed.exists():
            with contextlib.suppress(ValueError):  # damaged: then it is assessed again
                step = int(self._assessed.read_text())
        return int(from_main(step))

    def assessed(self, step: int):
        """Notes that the model of this step has been evaluated, for a run that is resumed there."""
        self.flush()
        if is_main():
            write_file(self._assessed, str(step))

    def flush(self):
        """Writes the events so far: what this process has not written is lost if it is killed."""
        self._events.flush()

    def goodput(self, step: int):
        """Logs where the time went, and the memory of the devices."""
        shown = "  ".join(f"{name} {share:.0%}" for name, share in self.clock.shares().items())
        memory = memory_in_use().get("device_memory_peak_gib")
        peak = f"  device memory {memory:.3g} GiB at most" if memory else ""
        logger.info("%s: %d  time since the start: %s%s", self._part, step, shown, peak)

    def fid(self, step: int, fid: float, best: float):
        """Writes the FID of the model at this step; `best` is the lowest one so far."""
        self._took("fid")
        self._write("write_scalars", step, {"fid": fid})
        logger.info("%s: %d  FID %.4g  (best so far: %.4g)", self._part, step, fid, best)
        self._beat(step)


def check_steps(
    window: list[dict[str, Any]],
    part: str,
    last_step: int,
    max_skipped: int,
    checkpoint: int | None,
):
    """Raises UserError if a metric is not finite or over `max_skipped` steps in a row were skipped.

    Args:
        window: the metrics of the steps up to `last_step`.
        checkpoint: the step of the last checkpoint, if there is one.
    """
    for step, metrics in enumerate(window, last_step - len(window) + 1):
        if metrics.get("skipped"):
            in_a_row = metrics["skipped_in_a_row"]
            if in_a_row > max_skipped:
                reason = (
                    f"{in_a_row} steps in a row were left out up to step {step}: their "
                    f"gradient norms are not finite, or over {FAR_ABOVE:g} times the median"
                )
                raise diverged(part, reason, checkpoint)
            continue
        values = flatten(metrics)
        for name in sorted(values, key=lambda name: "_loss" not in name):  # losses first
            if not np.isfinite(values[name]):
                raise diverged(part, f"{name} is {values[name]} at step {step}", checkpoint)


def diverged(part: str, reason: str, checkpoint: int | None) -> UserError:
    """The error that ends a training, with what to do."""
    section = PARTS[part].section
    saved, allow = "There is no checkpoint yet", ""
    if checkpoint is not None:
        saved = f"The last checkpoint is of step {checkpoint}"
        allow = (
            ", and name what you change: --allow_changes=learning_rate,clip,dtype,"
            "max_skipped_steps. --resume_step=N goes back to an older checkpoint"
        )
    return UserError(
        f"{part}: {reason}. {saved}. Run the same command again with a lower --config.{section}."
        f"optimizer.learning_rate or .clip, with --config.dtype=float32, or with --config.{section}"
        f".max_skipped_steps=10, which leaves out single bad steps{allow}."
    )


def summarize(window: list[dict[str, Any]]) -> dict[str, float]:
    """Mean metrics of the steps that were taken, codebook usage over all of them.

    "skipped_steps" is the number of the others, if steps may be left out.
    """
    if "skipped" in window[0]:
        counts = {"skipped_steps": float(sum(metrics["skipped"] for metrics in window))}
        taken = [
            {k: v for k, v in metrics.items() if not k.startswith("skipped")}
            for metrics in window
            if not metrics["skipped"]
        ]
        return counts | (summarize(taken) if taken else {})
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
