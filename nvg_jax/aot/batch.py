"""Global batch sizes: the default, valid ones, and the largest that fits."""

import logging
import math
import time

from nvg_jax.aot.lowering import Compiler, DoesNotFitError
from nvg_jax.runtime.hardware import device_memory

SAMPLES = 64  # default batch of the sampler

logger = logging.getLogger("nvg_jax")


def default_batch(compiler: Compiler) -> int:
    """The batch of the config, or of the sampler, rounded up to a multiple of the batch shards."""
    shards = compiler.target.batch_shards
    if compiler.part is None:
        return -(-SAMPLES // shards) * shards
    section = compiler.part.section
    configured = compiler.config[section].batch_size
    batch_size = -(-configured // shards) * shards
    if batch_size != configured:
        logger.warning(
            "The config's batch of %d does not split over the %d shards of the mesh; this report "
            "is for %d. Training needs --config.%s.batch_size=%d, or another --config.mesh.",
            configured, shards, batch_size, section, batch_size,
        )  # fmt: skip
    return batch_size


def free_memory(compiler: Compiler, batch_size: int) -> float:
    """Bytes that the compiled program leaves free on a device; negative if it does not fit."""
    started = time.monotonic()
    try:
        stats = compiler.compile(batch_size).program.memory_analysis()
        free = compiler.target.device.hbm - device_memory(stats)["total"]
    except DoesNotFitError as error:
        free = -error.missing
    logger.info(
        "batch %d %s (%.0f s)",
        batch_size, "fits" if free >= 0 else "does not fit", time.monotonic() - started,
    )  # fmt: skip
    return free


def find_batch(compiler: Compiler, max_compilations: int = 8) -> int:
    """The largest global batch that fits, usually with three compilations.

    Memory is nearly affine in the batch size. One and two samples per shard define a line; the
    batch at which it meets the limit is compiled as a check, which also gives the line a new point.
    The search ends when the check fits and the line predicts that no larger batch does, or when the
    next larger batch was compiled and does not fit. The result itself was compiled and fits.

    Raises:
        DoesNotFitError: one sample per shard is too large.
    """
    shards = compiler.target.batch_shards
    points, fits, size = [], 0, 1  # sizes in samples per shard
    too_large: int | None = None
    for _ in range(max_compilations):
        free = free_memory(compiler, size * shards)
        if free >= 0:
            fits = size
        else:
            too_large = size
        if not fits:
            raise DoesNotFitError(
                f"Not even a global batch of {shards} (one sample per shard) fits "
                f"{compiler.target.topology}. Try a larger --config.mesh.fsdp or more devices."
            )
        points += [(size, free)] if math.isfinite(free) else []
        predicted = line_root(*points[-2:]) if len(points) > 1 else 2
        if too_large == fits + 1 or (free >= 0 and predicted <= size):
            return fits * shards
        # Until a size is too large, the last one fits, and the line predicts more.
        if too_large is None or fits < predicted < too_large:
            size = predicted
        else:
            size = (fits + too_large) // 2
    logger.warning(
        "Stopped after %d compilations: a batch of %d fits, larger ones may fit too.",
        max_compilations,
        fits * shards,
    )
    return fits * shards


def line_root(start: tuple[int, float], end: tuple[int, float]) -> int:
    """The zero of the falling line through two points (x, y), rounded down.

    Twice the larger x if the line does not fall.
    """
    slope = (end[1] - start[1]) / (end[0] - start[0])
    return math.floor(end[0] - end[1] / slope) if slope < 0 else 2 * max(start[0], end[0])
