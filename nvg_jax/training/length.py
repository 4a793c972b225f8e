"""The length of a training, in steps or epochs, and what follows from it."""

import logging
import re
from typing import Any, NamedTuple

import ml_collections

from nvg_jax.errors import UserError
from nvg_jax.runtime.processes import is_main

logger = logging.getLogger("nvg_jax")

AUTO = -1  # in a recipe: follows from the length, see `resolved`
FORM = re.compile(
    r"\s*(\d+(?:\.\d+)?)\s*(steps?|epochs?)"
    r"(?:\s*,\s*at\s+least\s+(\d+)\s*steps?)?(?:\s*,\s*at\s+most\s+(\d+)\s*steps?)?\s*"
)


class Origin(NamedTuple):
    """Where the settings of a run last changed: the steps and the training images before it."""

    step: int
    images: int


START = Origin(0, 0)  # for a run whose settings never changed


def training_length(length: str, num_images: int, batch_size: int, origin: Origin = START) -> int:
    """The number of steps of a run, at least 1, those before `origin` included.

    Args:
        length: "800 steps", or "200 epochs" (a decimal number of epochs is allowed: "0.5 epochs"),
            with limits if you like: "200 epochs, at least 2000 steps, at most 4000 steps".
        num_images: images in an epoch.
        batch_size: images in a step from `origin` on.

    Raises:
        UserError: any other text, or a length of zero.
    """
    match = FORM.fullmatch(str(length))
    number, unit, least, most = match.groups() if match else ("0", "", None, None)
    least, most = int(least or 1), int(most or 10**18)
    wrong = unit.startswith("step") and "." in number
    if float(number) == 0 or wrong or not 1 <= least <= most:
        raise UserError(
            f"A training length is a positive number of steps or epochs, got {length!r}; write for "
            'example "800 steps" or "200 epochs" (--config.generator_training.length="800 steps"), '
            'or with limits "200 epochs, at least 2000 steps, at most 4000 steps".'
        )
    if unit.startswith("step"):
        steps = int(number)
    else:
        steps = step_of(float(number), num_images, batch_size, origin)
    return min(max(steps, least), most)


def step_of(epochs: float, num_images: int, batch_size: int, origin: Origin = START) -> int:
    """The step, rounded, at which a run has seen its data `epochs` times."""
    return origin.step + round((epochs * num_images - origin.images) / batch_size)


def resolved(recipe: ml_collections.ConfigDict, num_images: int) -> ml_collections.ConfigDict:
    """A recipe with numbers in place of `AUTO`, which follow from its steps.

    - `warmup_steps`: a twentieth of the steps, at most the published 1,000.
    - `ema_decay`: the average covers a twentieth of the steps, at most the published 10,000.
    - `log_every`: a hundredth of the steps, at most 100.
    - `eval_every`: a tenth of the steps, at most 5,000; `save_every`: half of that.
    """
    steps = training_length(recipe.length, num_images, recipe.batch_size)
    share = lambda parts, most: max(1, min(steps // parts, most))
    values = dict(log_every=share(100, 100), eval_every=share(10, 5000), save_every=share(20, 2500))
    optimizer = dict(warmup_steps=min(steps // 20, 1000), ema_decay=1 - 1 / share(20, 10_000))

    def chosen(section: ml_collections.ConfigDict, values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if section[name] == AUTO}

    recipe = recipe.copy_and_resolve_references()
    recipe.update(chosen(recipe, values))
    recipe.optimizer.update(chosen(recipe.optimizer, optimizer))
    return recipe


def warn_if_too_short(section: str, recipe: ml_collections.ConfigDict, steps: int):
    """Warns of a warm-up or an average that is longer than the training of `steps` steps."""
    warmup, decay = recipe.optimizer.warmup_steps, recipe.optimizer.ema_decay
    advice = f"Set it to {AUTO}, so that it follows from the length, or train longer"
    if not is_main():
        return
    if warmup >= steps:
        logger.warning(
            "%s.optimizer.warmup_steps=%d is longer than the training, %d steps: the learning rate "
            "stays below its peak. %s.", section, warmup, steps, advice,
        )  # fmt: skip
    if not recipe.optimizer.ema_warmup and decay**steps > 0.1:
        logger.warning(
            "%s.optimizer.ema_decay=%g leaves the averaged weights %.0f%% the initial ones after "
            "%d steps. %s.", section, decay, 100 * decay**steps, steps, advice,
        )  # fmt: skip
