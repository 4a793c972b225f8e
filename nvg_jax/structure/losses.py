"""The structure generator's objective over all stages of an image at once (paper, Section 3.3)."""

import jax
import jax.numpy as jnp

from nvg_jax import granularity
from nvg_jax.structure import flow


def structure_losses(velocity, structure, canvases, noise, times, weights=None):
    """Flow-matching loss of each learned split, float32 (K - 1,).

    Args:
        velocity: (noisy, time, structure embedding, canvas, stage) -> velocity, as
            `StructureGenerator` with class ids and randomness bound, on a batch B * (K - 1) that
            runs through the stages of an image first.
        structure: int32 (B, S, L).
        canvases: float32 (B, S, L, D), the canvas after each stage.
        noise: float32 (B, L, K), shared by the stages of an image.
        times: float32 (B, K - 1) in [0, 1].
        weights: float32 (B,), the share of each image in the averages, 1 in all; alike if None.
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


def draw_times(key, batch: int, learned: int):
    """Times of training: sigmoid of a normal for each image and stage, float32 (B, K - 1)."""
    return jax.nn.sigmoid(jax.random.normal(key, (batch, learned)))
