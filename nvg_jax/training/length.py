"""The length of a training run, given in steps or in epochs."""

import re

from nvg_jax.errors import UserError


def training_length(length: str, num_images: int, batch_size: int) -> int:
    """The number of steps of a run, at least 1.

    Args:
        length: "800 steps", or "200 epochs" (a decimal number of epochs is allowed: "0.5 epochs").
        num_images: images in an epoch.
        batch_size: images in a step.

    Raises:
        UserError: any other text, or a length of zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s+(steps?|epochs?)\s*", str(length))
    number, unit = match.groups() if match else ("0", "")
    if float(number) == 0 or (unit.startswith("step") and "." in number):
        raise UserError(
            f"A training length is a positive number of steps or epochs, got {length!r}; write for "
            'example "800 steps" or "200 epochs" (--config.generator_training.length="800 steps").'
        )
    if unit.startswith("step"):
        return int(number)
    return max(1, round(float(number) * num_images / batch_size))
