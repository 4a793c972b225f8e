"""Loss of the structure generator, over all stages of an image at once (paper, Section 3.3).

`training.generators.loss_terms` weights and adds the losses.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from nvg_jax import granularity
from nvg_jax.structure import flow


def structure_losses(
    velocity: Callable[..., Array],
    structure: Array,
    canvases: Array,
    noise: Array,
    times: Array,
    weights: Array | None = None,
) -> Array:
    """Flow-matching loss of each learned split, float32 (K - 1,).

    The splits of stages 0 .. K - 2 are learned. The last one, of pairs into single positions, is
    not: either order of the two is valid.

    Args:
        velocity: (noisy, time, structure embedding, canvas, stage) -> velocity, such as
            `StructureGenerator` with class ids and randomness bound. It is called once, on a batch
            of B * (K - 1) with the stages of an image adjacent.
        structure: int32 (B, S, L).
        canvases: float32 (B, S, L, D), the canvas after each stage.
        noise: float32 (B, L, K), shared by the stages of an image.
        times: float32 (B, K - 1) in [0, 1].
        weights: float32 (B,), per-image weights that sum to 1; None means uniform.
    """
    batch, stages, length = structure.shape
    num_bits, learned = stages - 1, stages - 2
    embedding = granularity.structure_embedding(structure, jnp.arange(stages), num_bits)
    target = embedding[:, -1].astype(jnp.float32) - 1
    fold = lambda x: x.reshape(batch * learned, *x.shape[2:])
    per_stage = lambda x: fold(jnp.broadcast_to(x[:, None], (batch, learned, length, num_bits)))
    stage = jnp.tile(jnp.arange(learned), batch)
    target = per_stage(target)
    noisy, noise = flow.path(per_stage(noise), target, fold(times), stage)
    predicted = velocity(
        noisy, fold(times), fold(embedding[:, :learned]), fold(canvases[:, :learned]), stage
    )
    error = jnp.square(noise - predicted - target).mean((1, 2))
    return jnp.average(error.reshape(batch, learned), axis=0, weights=weights)


def draw_times(key: Array, batch: int, learned: int) -> Array:
    """Training times: sigmoid of a standard normal, per image and stage, float32 (B, K - 1)."""
    return jax.nn.sigmoid(jax.random.normal(key, (batch, learned)))
