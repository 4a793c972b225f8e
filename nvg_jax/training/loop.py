"""The training loop. It knows no model: a `Trainer` says what one step does."""

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from nvg_jax.errors import UserError
from nvg_jax.metadata import RunMetadata, read_export_metadata, write_export
from nvg_jax.runtime import checkpoint, preemption, sharding, watchdog
from nvg_jax.training.forecast import Forecast
from nvg_jax.training.metrics import Reporter
from nvg_jax.training.resume import resume
from nvg_jax.training.run import Run
from nvg_jax.training.trainer import Trainer
from nvg_jax.training.watching import Profiler

logger = logging.getLogger("nvg_jax")

Score = Callable[[RunMetadata, dict[str, Any]], float]


def fit(trainer: Trainer, run: Run, score: Score | None = None, forecast: Forecast | None = None):
    """Trains one part to the end, from its latest checkpoint if there is one.

    Args:
        score: measures FID every `fid_every` steps; the best model is kept in WORKDIR/best_NAME.
        forecast: of the whole run, for the time that is left.

    Raises:
        Preempted: SIGTERM arrived; the state is saved.
        UserError: a metric is not finite, and the message names the step and the metric; the config
            differs from the one this run was started with; or another process is training in the
            same folder.
    """
    name, recipe = trainer.part.name, run.config[trainer.part.section]
    folder = run.workdir / name
    inputs, metadata = trainer.open(run)
    key = jax.random.fold_in(run.key, trainer.STEP_KEY)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(checkpoint.Checkpoints(folder, recipe.keep))
        if checkpoints.latest_step is None:
            state, position, start = trainer.first_state(run, inputs), None, 0
        else:
            trainer, state, metadata, position, start = resume(trainer, run, metadata, checkpoints)
        steps = trainer.steps
        batches = run.train_batches(
            recipe.batch_size, run.config.seed + trainer.DATA_SEED, skip=trainer.origin.images
        )
        stack.enter_context(contextlib.closing(batches))
        stack.callback(preemption.defer_interrupts, False)
        if position is not None:
            batches.set_state(position)
        reporter = Reporter(trainer, run, start, forecast)
        stack.enter_context(contextlib.closing(reporter))
        best = BestModel(run, trainer, score, start) if score else None
        assessed = reporter.last_assessed
        if assessed > start:  # an abandoned step, or an earlier training's
            reporter.assessed(0)

        def due(step: int) -> tuple[bool, bool]:
            """Whether to evaluate the model after `step` steps, and whether to measure its FID."""
            evaluate = step == steps or step % recipe.eval_every == 0
            return evaluate, best is not None and (step == steps or step % recipe.fid_every == 0)

        clock = reporter.clock
        profiler = Profiler(folder, run.config.profile_steps)
        stack.enter_context(contextlib.closing(profiler))

        def assess(step: int):
            evaluate, measure = due(step)
            with clock.timed("evaluating"):
                if evaluate:
                    reporter.evaluation(step, *trainer.evaluate(run, state, inputs, metadata))
                if best is not None and measure:
                    params = trainer.export(run, state, inputs)
                    finished = step == steps
                    finish = lambda: metadata if finished else trainer.finish(run, state, metadata)
                    reporter.fid(step, *best.update(step, metadata, params, finish))
                reporter.assessed(step)
            reporter.goodput(step)

        if start and any(due(start)) and assessed != start:
            # The run ended between the save of this step and the end of its evaluation.
            if start == steps:
                metadata = trainer.finish(run, state, metadata)
            assess(start)
        index_backprop = None
        for step in range(start, steps):
            before, index_backprop = index_backprop, trainer.index_backprop(step)
            compiles = index_backprop is not before  # two programs at most
            watchdog.reset(slow=True)  # the data
            preemption.defer_interrupts(step > start)
            reporter.start_step()
            done = step + 1
            profiler.before(done)
            with clock.timed("data"):
                batch = next(batches)
                watchdog.reset(slow=compiles)
                batch = sharding.global_batch(batch, run.mesh)
            with (
                clock.timed("compiling") if compiles else contextlib.nullcontext(),
                jax.profiler.StepTraceAnnotation("train", step_num=done),
            ):
                state, metrics = trainer.jit_train_step(
                    state, inputs, batch, key, index_backprop=index_backprop
                )
            profiler.after(done, metrics)
            reporter.add(metrics)

            last = done == steps
            preempted = preemption.noticed()
            save = last or preempted or done % recipe.save_every == 0
            if save or any(due(done)) or done % recipe.log_every == 0:
                rate = np.asarray(trainer.schedule(step)).item()
                reporter.progress(done, rate, checkpoints.latest_step)

            if save:
                with clock.timed("saving"):
                    if last:
                        metadata = trainer.finish(run, state, metadata)
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
                reporter.flush()
                preemption.stop(
                    f"{name}: saved at step {done} of {steps}. The same command goes on from there."
                )


class BestModel:
    """Keeps the model with the lowest FID during a training, as an export in its own folder.

    Args:
        start: the step that the training goes on from. A model of a later one is ignored, since
            that step was abandoned or belongs to an earlier training; so is one whose FID was
            measured in another way.
    """

    def __init__(self, run: Run, trainer: Trainer, score: Score, start: int):
        self._folder, self._score = run.workdir / f"best_{trainer.part.name}", score
        self.fid = float("inf")
        try:
            stored = read_export_metadata(self._folder) if start else None
        except UserError as error:
            raise UserError(f"{error} Or delete {self._folder}.") from error
        if stored is None:
            return

        def way(config: dict[str, Any], num_images: int | None):
            data = {name: config["data"][name] for name in ("name", "resize", "pad")}
            samples = config[trainer.part.section]["fid_samples"]
            return config["evaluation"], config["sampling"], data, num_images, samples

        assert stored.config is not None
        same = way(stored.config, stored.num_images) == way(run.config_json(), trainer.num_images)
        assert stored.fid is not None and stored.step is not None  # `update` exports both
        if same and stored.step <= start:
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
            metadata = finish().replace(fid=fid, step=step, base=None)  # adapters are merged
            write_export(self._folder, metadata, params)
        return fid, self.fid
