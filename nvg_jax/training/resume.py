"""How a run goes on from a checkpoint."""

import logging
import os
from typing import Any

import numpy as np
from etils import epath

from nvg_jax.errors import UserError
from nvg_jax.metadata import RunMetadata, read_metadata
from nvg_jax.parts import CHOICES, GENERATOR_PARTS, TOKENIZER
from nvg_jax.runtime import checkpoint
from nvg_jax.training.changes import changed_settings, check_changes
from nvg_jax.training.length import START, Origin
from nvg_jax.training.run import Run
from nvg_jax.training.state import TrainState
from nvg_jax.training.trainer import Trainer

logger = logging.getLogger("nvg_jax")


def standing(trainer: Trainer, run: Run) -> tuple[Trainer, int]:
    """Where `fit` will go on: (the trainer with its schedule restated, the step).

    It reads no state: what a later part refuses is refused before an earlier one is trained.

    Raises:
        UserError: as `resume`; there is no checkpoint to go back to; or the tokenizer would be
            changed under generators.
    """
    folder, section = run.workdir / trainer.part.name, trainer.part.section
    latest = read_metadata(folder)
    if latest is None:
        if run.resume.step is not None:
            raise UserError(
                f"--resume_step={run.resume.step}: there is no checkpoint in {folder}. Correct "
                "--workdir, or leave the flag out to start a new run."
            )
        return trainer, 0
    _, new = trainer.open(run)
    step = step_to_go_back_to(trainer, run, latest, new)
    if step is not None:
        checkpoint.check_step(folder, step)
    stored = latest if step is None else read_metadata(folder, step)
    assert stored is not None and stored.step is not None  # or all are damaged, which it says
    check_changes(stored, new, section, folder, run.resume.allow_changes)
    trainer, new = continued(trainer, run, stored, new, step)
    check_start(stored, new, folder, finished=stored.step >= trainer.steps)
    if trainer.part == TOKENIZER and new.changes != stored.changes and stored.step < trainer.steps:
        check_unused(run, latest)
    return trainer, stored.step


def check_start(stored: RunMetadata, new: RunMetadata, folder: epath.Path, finished: bool):
    """Raises UserError if a run, or its later parts, would start from other weights than it did.

    The base of adapters may move.
    """
    assert stored.config is not None and new.config is not None  # both are of trainings
    before, now = stored.config["init_from"], new.config["init_from"]
    moved = os.path.abspath(now) != os.path.abspath(before)
    if now and moved and not finished and not new.config["lora"]["rank"]:
        raise UserError(
            f"--config.init_from={now} has no effect: the run in {folder} has "
            "started already. Leave it as it was, or give another --workdir."
        )
    later = [p.name for p in CHOICES[new.config["part"]] if not (folder.parent / p.name).exists()]
    if before and not now and later:
        raise UserError(
            f"The run in {folder} started from --config.init_from={before}, and so would "
            f"{' and '.join(later)}: give it again, or train the others with --config.part."
        )


def check_unused(run: Run, tokenizer: RunMetadata):
    """Raises UserError if generators in the workdir were trained with its tokenizer.

    More training with a change would make it another one, which they do not fit.
    """
    for part in GENERATOR_PARTS:
        stored = read_metadata(run.workdir / part.name)
        if stored and tokenizer.fingerprint in (None, stored.fingerprint):
            raise UserError(
                f"{run.workdir / part.name} was trained with the tokenizer in {run.workdir} and "
                "would not fit it after more training. To keep this tokenizer, train with "
                "--config.part=generators; for another one, give another --workdir, or move that "
                "folder away."
            )


def step_to_go_back_to(
    trainer: Trainer, run: Run, latest: RunMetadata | None, new: RunMetadata
) -> int | None:
    """`run.resume.step`, or None if the run, of which `latest` is, went back there already.

    That checkpoint may have been damaged: then it is the one before, which is the latest.
    """
    step, folder = run.resume.step, run.workdir / trainer.part.name
    if step is None:
        return None
    if latest is None:
        return step
    lost = (folder / f"damaged_{step}").exists() and not (folder / str(step)).exists()
    if lost and latest.step is not None and latest.step < step:
        return latest.step
    if not latest.went_back_to(step):
        return step
    if changed_settings(latest, new, trainer.part.section):
        return step
    logger.info("%s: this run went back to step %d already", trainer.part.name, step)
    return None  # it was interrupted afterwards


def continued(
    trainer: Trainer, run: Run, stored: RunMetadata, new: RunMetadata, step: int | None
) -> tuple[Trainer, RunMetadata]:
    """How a run goes on from a checkpoint: (trainer, its schedule restated; `new` with history).

    Args:
        stored: the metadata of the checkpoint.
        step: see `step_to_go_back_to`.

    Raises:
        UserError: there is nothing left to train.
    """
    section, start, changes = trainer.part.section, stored.step, stored.changes
    assert start is not None  # it was read
    settings = changed_settings(stored, new, section)
    if settings or step is not None:
        change = {
            "step": start,
            "images": stored.images_seen(section, start),
            "settings": {k: [*v] for k, v in settings.items()},
        }
        if step is not None:
            change["resume_step"] = run.resume.step
        changes = (*changes, change)
    origin = Origin(changes[-1]["step"], changes[-1]["images"]) if changes else START
    if origin != trainer.origin:
        trainer = trainer.restated(origin)
    if settings and trainer.steps <= start and not trainer.steps == start == stored.steps:
        raise UserError(
            f"{section}.length = {trainer.recipe.length!r} is {trainer.steps} steps, and the "
            f"checkpoint in {run.workdir / trainer.part.name} is of step {start}. Give a longer "
            "one, go back with --resume_step, or train the other parts alone with --config.part."
        )
    return trainer, new.replace(changes=changes, steps=trainer.steps)


def resume(
    trainer: Trainer, run: Run, new: RunMetadata, checkpoints: checkpoint.Checkpoints
) -> tuple[Trainer, Any, RunMetadata, Any, int]:
    """Restores the checkpoint to go on from, and records what changed since it was written.

    The data go on after the images seen before, in the order of the new settings.

    Args:
        new: the metadata of the run without its history.

    Returns:
        (trainer with its schedule restated, state, metadata, data position, step); the position is
        None at the trainer's `origin`.

    Raises:
        UserError: settings changed that are not allowed to, or there is nothing left to train.
    """
    name, section = trainer.part.name, trainer.part.section
    latest = None if run.resume.step is None else read_metadata(run.workdir / name)
    step = step_to_go_back_to(trainer, run, latest, new)

    def abstract_of(content: dict[str, Any]) -> TrainState:
        stored = RunMetadata.from_json(content)
        check_changes(stored, new, section, run.workdir / name, run.resume.allow_changes)
        return trainer.stored_state(stored)

    state, content, position = checkpoints.restore(abstract_of, step)
    stored = RunMetadata.from_json(content)
    assert stored.step is not None  # it was read
    trainer, metadata = continued(trainer, run, stored, new, step)
    if metadata.changes != stored.changes:
        position = None
    if settings := changed_settings(stored, new, section):
        logger.info(
            "%s: changed at step %d, after %d images: %s. The optimizer's state is kept, and the "
            "learning rate goes on at %.3g.",
            name,
            stored.step,
            metadata.changes[-1]["images"],
            "; ".join(f"{key} from {old!r} to {now!r}" for key, (old, now) in settings.items()),
            np.asarray(trainer.schedule(stored.step)).item(),
        )
    return trainer, trainer.resumed(state), metadata, position, stored.step
