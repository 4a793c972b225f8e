"""The training loop. It knows no model: a `Trainer` says what one step does."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from nvg_jax.runtime import checkpoint, preemption, sharding, watchdog
from nvg_jax.training.metrics import Reporter
from nvg_jax.training.run import Run
from nvg_jax.training.trainer import Trainer
from nvg_jax.workdir import RunMetadata, check_resume, read_export_metadata, write_export

Score = Callable[[RunMetadata, dict[str, Any]], float]


def fit(trainer: Trainer, run: Run, score: Score | None = None):
    """Trains one part to the end, from its latest checkpoint if there is one.

    Args:
        score: measures FID every `fid_every` steps; the best model is kept in WORKDIR/best_NAME.

    Raises:
        Preempted: SIGTERM arrived; the state is saved.
        UserError: a metric is not finite, and the message names the step and the metric; the config
            differs from the one this run was started with; or another process is training in the
            same folder.
    """
    name, steps, recipe = trainer.part.name, trainer.steps, run.config[trainer.part.section]
    folder = run.workdir / name
    inputs, metadata = trainer.open(run)
    key = jax.random.fold_in(run.key, trainer.STEP_KEY)
    batches = run.train_batches(recipe.batch_size, run.config.seed + trainer.DATA_SEED)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(batches))
        checkpoints = stack.enter_context(checkpoint.Checkpoints(folder, recipe.keep))
        if checkpoints.latest_step is None:
            state, start = trainer.first_state(run, inputs), 0
        else:
            state, position, start = checkpoints.restore(
                trainer.abstract_state,
                lambda stored: check_resume(
                    RunMetadata.from_json(stored), metadata, trainer.part.section, folder
                ),
            )
            batches.set_state(position)
        reporter = Reporter(name, folder, start, steps, recipe.batch_size)
        stack.enter_context(contextlib.closing(reporter))
        best = BestModel(run.workdir / f"best_{name}", score, new=start == 0) if score else None

        def due(step: int) -> tuple[bool, bool]:
            """Whether to evaluate the model after `step` steps, and whether to measure its FID."""
            evaluate = step == steps or step % recipe.eval_every == 0
            return evaluate, best is not None and (step == steps or step % recipe.fid_every == 0)

        def assess(step: int):
            evaluate, measure = due(step)
            if evaluate:
                reporter.evaluation(step, *trainer.evaluate(run, state, inputs, metadata))
            if best is not None and measure:
                params = trainer.export(run, state, inputs)
                finished = step == steps
                finish = lambda: metadata if finished else trainer.finish(run, state, metadata)
                reporter.fid(step, *best.update(step, metadata, params, finish))
            reporter.assessed(step)

        if start and any(due(start)) and reporter.last_assessed != start:
            # The run ended between the save of this step and the end of its evaluation.
            if start == steps:
                metadata = trainer.finish(run, state, metadata)
            assess(start)
        for step in range(start, steps):
            watchdog.reset(slow=step == start)  # the first step compiles
            reporter.start_step()
            batch = sharding.global_batch(next(batches), run.mesh)
            state, metrics = trainer.jit_train_step(
                state, inputs, batch, key, warming_up=trainer.warming_up(step)
            )
            reporter.add(metrics)

            done = step + 1
            last = done == steps
            preempted = preemption.noticed()
            save = last or preempted or done % recipe.save_every == 0
            if save or any(due(done)) or done % recipe.log_every == 0:
                reporter.progress(
                    done, learning_rate=np.asarray(trainer.learning_rate(step)).item()
                )

            if last:
                metadata = trainer.finish(run, state, metadata)
            if save:
                checkpoints.save(done, state, metadata.to_json(), batches.get_state())
            if any(due(done)) and not preempted:
                try:
                    assess(done)
                except preemption.Preempted:
                    preempted = True
                    if not save:
                        checkpoints.save(done, state, metadata.to_json(), batches.get_state())
            if preempted:
                checkpoints.wait()
                raise preemption.Preempted(f"{name}: preempted; saved at step {done} of {steps}")


class BestModel:
    """Keeps the model with the lowest FID during a training, as an export in its own folder.

    Args:
        new: whether the training starts afresh; then a model from an earlier one is ignored.
    """

    def __init__(self, folder: epath.Path, score: Score, new: bool):
        self._folder, self._score = folder, score
        stored = None if new else read_export_metadata(folder)
        self.fid = float("inf")
        if stored:
            assert stored.fid is not None  # `update` exports with the FID
            self.fid = stored.fid

    def update(
        self,
        step: int,
        metadata: RunMetadata,
        params: dict[str, Any],
        finish: Callable[[], RunMetadata],
    ) -> tuple[float, float]:
        """Measures a model and keeps it if it is the best: (its FID, the lowest FID).

        Args:
            params: {network: NumPy parameters}.
            finish: gives the metadata to keep it with; called only if it is kept.
        """
        fid = self._score(metadata, params)
        if fid < self.fid:
            self.fid = fid
            write_export(self._folder, finish().replace(fid=fid, step=step), params)
        return fid, self.fid
