"""The training of parts, one after the other, and its rehearsal."""

import logging
import os
import shlex
from collections.abc import Sequence

from nvg_jax.errors import UserError
from nvg_jax.jobs.scoring import fid_measurements
from nvg_jax.metadata import read_metadata
from nvg_jax.models import generators_for
from nvg_jax.parts import GENERATOR_PARTS, TOKENIZER, Part
from nvg_jax.runtime import heartbeat
from nvg_jax.runtime.processes import from_main, is_main
from nvg_jax.runtime.storage import alone, make_folder
from nvg_jax.training import forecast, loop, plan, rehearsal, resume
from nvg_jax.training.registry import open_trainer
from nvg_jax.training.run import Run
from nvg_jax.training.trainer import Trainer

logger = logging.getLogger("nvg_jax")


def standings(run: Run, parts: Sequence[Part]) -> list[tuple[Trainer, int]]:
    """The trainer of each part and the step that it goes on from; see `resume.standing`.

    Generators whose tokenizer has yet to finish, perhaps since its last checkpoint is damaged, are
    checked when it is their turn.

    Raises:
        UserError: as `resume.standing`, or there are generators and no tokenizer.
    """
    check_generators(run, parts)
    result = []
    for part in parts:
        trainer = open_trainer(run, part)
        tokenizer, done = result[0] if result else (trainer, trainer.steps)
        waits = tokenizer.part == TOKENIZER and done < tokenizer.steps
        stored = read_metadata(run.workdir / part.name) if waits else None
        if stored is None:
            result.append(resume.standing(trainer, run))
        elif done:
            result.append((trainer, stored.step))
        else:
            raise UserError(
                f"{run.workdir / part.name} was trained with a tokenizer that {run.workdir} lacks. "
                f"Restore its folder {TOKENIZER.name}/, or move that folder away."
            )
    return result


def check_generators(run: Run, parts: Sequence[Part]):
    """Raises UserError if a generator to train would be the second one of its kind in the workdir.

    No command could open that.
    """
    for other in GENERATOR_PARTS:
        for part in parts:
            shared = set(part.networks) & set(other.networks)
            if part != other and shared and read_metadata(run.workdir / other.name):
                raise UserError(
                    f"{run.workdir} holds a trained {min(shared)} generator in {other.name}/, and "
                    f"part={run.config.part} would train another one in {part.name}/. Go on with "
                    f"--config.part={other.name}, give another --workdir, or move that folder away."
                )


def train_parts(run: Run, parts: Sequence[Part]):
    """Trains parts one after the other, each from its latest checkpoint; see `loop.fit`."""
    # All trainers first, so that no setting of a later part is refused after days of training.
    found = standings(run, parts)
    trainers = [trainer for trainer, _ in found]
    trainer, start = next((each for each in found if each[1] < each[0].steps), found[-1])
    folder = run.workdir / trainer.part.name
    if from_main(folder.exists()):  # before anything of a run that goes on is replaced
        with alone(folder):
            pass
    if is_main():
        make_folder(run.workdir)
    try:
        heartbeat.beat(run.workdir, trainer.part.name, start, start)
        measurements = fid_measurements(run, parts)
        scores = {part: measurement.score for part, measurement in measurements.items()}
        plan.announce(run, trainers)
        ahead = forecast.forecast(run, trainers)
        for trainer in trainers:
            loop.fit(trainer, run, scores.get(trainer.part), ahead)
    finally:
        heartbeat.stop()
    trained = {name for part in parts for name in part.networks}
    if trained >= set(generators_for(run.model.tokenizer)):
        workdir = shlex.quote(os.fspath(run.workdir))
        command = f"python -m nvg_jax.sample --workdir={workdir} --out=samples/"
        logger.info("finished; to draw samples: %s", command)


def rehearse_parts(run: Run, parts: Sequence[Part], price: float):
    """Tells whether `train_parts` will work and what it takes; see `rehearsal.rehearse`."""
    trainers = standings(run, parts)
    measurements = fid_measurements(run, parts)
    seconds = {part: measurement.seconds for part, measurement in measurements.items()}
    rehearsal.rehearse(run, trainers, seconds, price)
