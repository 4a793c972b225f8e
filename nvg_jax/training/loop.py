"""The training loop. It knows no model: a `Task` tells it all about the part it trains."""

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
from nvg_jax.workdir import RunMetadata, check_resume


class Task(NamedTuple):
    """One trained part.

    name: of the part and of its folder in the workdir.
    recipe: batch_size, log_every, eval_every, save_every, keep.
    steps: the length of the training.
    state: the abstract state, with shardings.
    learning_rate: step -> learning rate.
    metadata: stored with every checkpoint.
    batches: this process's share of the training batches; resumable.
    init: () -> the initial state.
    update: (state, global batch, step) -> (state, metrics).
    evaluate: state -> (metrics on held-out data, picture uint8 (H, W, 3) or None).
    finish: state -> the metadata of the last checkpoint.
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


def fit(task: Task, workdir: epath.Path, mesh: jax.sharding.Mesh):
    """Trains one part to the end, from its latest checkpoint if there is one.

    Raises:
        Preempted: SIGTERM arrived; the state is saved.
        FloatingPointError: a metric is not finite; names the step and the metric.
        ValueError: the config differs from the one this run was started with.
    """
    folder, recipe, steps = workdir / task.name, task.recipe, task.steps
    checkpoints = checkpoint.Checkpoints(folder, recipe.keep)
    state, start = resume(task, checkpoints, folder)
    reporter = Reporter(task.name, folder, start, steps, recipe.batch_size)
    with checkpoints, contextlib.closing(task.batches), contextlib.closing(reporter):
        for step in range(start, steps):
            reporter.start_step()
            batch = sharding.global_batch(next(task.batches), mesh)
            state, metrics = task.update(state, batch, step)
            reporter.add(metrics)

            done = step + 1
            last = done == steps
            preempted = preemption.noticed()
            evaluate = last or done % recipe.eval_every == 0
            save = last or preempted or done % recipe.save_every == 0
            if save or evaluate or done % recipe.log_every == 0:
                reporter.progress(done, learning_rate=float(task.learning_rate(step)))

            metadata = task.finish(state) if last else task.metadata
            if save:
                checkpoints.save(done, state, metadata.to_json(), task.batches.get_state())
            if evaluate and not preempted:
                try:
                    reporter.evaluation(done, *task.evaluate(state))
                except preemption.Preempted:
                    preempted = True
                    if not save:
                        checkpoints.save(done, state, metadata.to_json(), task.batches.get_state())
            if preempted:
                checkpoints.wait()
                raise preemption.Preempted(
                    f"{task.name}: preempted; saved at step {done} of {steps}"
                )


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
