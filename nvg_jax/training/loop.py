"""The training loop. It knows no model: a `Task` describes the part that it trains."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import grain
import jax
import ml_collections
import numpy as np
import optax
from etils import epath

from nvg_jax.runtime import checkpoint, preemption, sharding
from nvg_jax.training.metrics import Reporter
from nvg_jax.workdir import (
    EXPORT_FOLDER,
    RunMetadata,
    check_resume,
    read_metadata,
    write_export,
)


class Task(NamedTuple):
    """One trained part.

    name: the name of the part and of its folder in the workdir.
    recipe: batch_size, log_every, eval_every, eval_images, save_every, keep.
    steps: the length of the training.
    state: the abstract state, with shardings.
    learning_rate: step -> learning rate.
    metadata: stored with every checkpoint.
    batches: this process's share of the training batches; resumable.
    init: () -> the initial state.
    update: (state, global batch, step) -> (state, metrics).
    evaluate: state -> (metrics on held-out data, picture uint8 (H, W, 3) or None).
    finish: state -> the metadata of the last checkpoint.
    model: state -> the NumPy parameters of the model whose FID is measured, {network: tree}.
    """

    name: str
    recipe: ml_collections.ConfigDict
    steps: int
    state: Any
    learning_rate: optax.Schedule
    metadata: RunMetadata
    batches: grain.DatasetIterator
    init: Callable[[], Any]
    update: Callable[[Any, Any, int], tuple[Any, dict[str, Any]]]
    evaluate: Callable[[Any], tuple[dict[str, Any], np.ndarray | None]]
    finish: Callable[[Any], RunMetadata]
    model: Callable[[Any], dict[str, Any]]


def fit(
    task: Task,
    workdir: epath.Path,
    mesh: jax.sharding.Mesh,
    score: Callable[[RunMetadata, dict[str, Any]], float] | None = None,
):
    """Trains one part to the end, from its latest checkpoint if there is one.

    Args:
        score: measures FID every `recipe.fid_every` steps; the best model is kept in
            `workdir`/best_NAME.

    Raises:
        Preempted: SIGTERM arrived; the state is saved.
        UserError: a metric is not finite; the message names the step and the metric.
        UserError: the config differs from the one this run was started with, or another process
            is training in the same folder.
    """
    folder, recipe, steps = workdir / task.name, task.recipe, task.steps
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(checkpoint.Checkpoints(folder, recipe.keep))
        stack.enter_context(contextlib.closing(task.batches))
        state, start = resume(task, checkpoints, folder)
        reporter = Reporter(task.name, folder, start, steps, recipe.batch_size)
        stack.enter_context(contextlib.closing(reporter))
        best = score and BestModel(workdir / f"best_{task.name}", score, new=start == 0)
        for step in range(start, steps):
            reporter.start_step()
            batch = sharding.global_batch(next(task.batches), mesh)
            state, metrics = task.update(state, batch, step)
            reporter.add(metrics)

            done = step + 1
            last = done == steps
            preempted = preemption.noticed()
            evaluate = last or done % recipe.eval_every == 0
            measure = best and (last or done % recipe.fid_every == 0)
            save = last or preempted or done % recipe.save_every == 0
            if save or evaluate or measure or done % recipe.log_every == 0:
                reporter.progress(done, learning_rate=float(task.learning_rate(step)))

            metadata = task.finish(state) if last else task.metadata
            if save:
                checkpoints.save(done, state, metadata.to_json(), task.batches.get_state())
            if (evaluate or measure) and not preempted:
                try:
                    if evaluate:
                        reporter.evaluation(done, *task.evaluate(state))
                    if measure:
                        reporter.fid(done, *best.update(done, task, state))
                except preemption.Preempted:
                    preempted = True
                    if not save:
                        checkpoints.save(done, state, metadata.to_json(), task.batches.get_state())
            if preempted:
                checkpoints.wait()
                raise preemption.Preempted(
                    f"{task.name}: preempted; saved at step {done} of {steps}"
                )


class BestModel:
    """Keeps the model with the lowest FID during a training, as an export in its own folder.

    Args:
        new: whether the training starts afresh; then a model from an earlier one is ignored.
    """

    def __init__(self, folder: epath.Path, score: Callable, new: bool):
        self._folder, self._score = folder, score
        found = None if new else read_metadata(folder / EXPORT_FOLDER)
        self.fid = found.fid if found else float("inf")

    def update(self, step: int, task: Task, state) -> tuple[float, float]:
        """Measures a state's model and keeps it if it is the best: (its FID, the lowest FID)."""
        params = task.model(state)
        fid = self._score(task.metadata, params)
        if fid < self.fid:
            self.fid = fid
            write_export(self._folder, task.finish(state).replace(fid=fid), params, step)
        return fid, self.fid


def resume(task: Task, checkpoints: checkpoint.Checkpoints, folder: epath.Path) -> tuple[Any, int]:
    """(state, step) to start from; sets the position of `task.batches`."""
    if checkpoints.latest_step is None:
        return task.init(), 0
    state, position, step = checkpoints.restore(
        task.state,
        lambda stored: check_resume(RunMetadata.from_json(stored), task.metadata, folder),
    )
    task.batches.set_state(position)
    return state, step
