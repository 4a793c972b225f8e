"""Loss of the structure generator, over all stages of an image at once (paper, Section 3.3)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32, Int, PRNGKeyArray

from nvg_jax import granularity
from nvg_jax.structure import flow


class Teacher(NamedTuple):
    """A trained flow to learn from; exactly one of the two is not None.

    solution: (noise, structure embedding, canvas, stage) -> the end point of its flow from the
        noise, float32 (B * (K - 1), L, K). The student learns the straight lines between the two:
        reflow (Liu et al., arXiv 2209.03003).
    velocity: (noisy, time, structure embedding, canvas, stage) -> its velocity, which the student
        learns at points between noise and the structure of the images; if it is guided, this is
        guidance distillation (Meng et al., arXiv 2210.03142).
    """

    solution: Callable[..., Array] | None = None
    velocity: Callable[..., Array] | None = None


def structure_losses(
    velocity: Callable[..., Array],
    structure: Int[Array, "B S L"],
    canvases: Float[Array, "B S L D"],
    noise: Float[Array, "B L K"],
    times: Float[Array, "B K-1"],
    weights: Float[Array, " B"] | None = None,
    teacher: Teacher | None = None,
) -> Float32[Array, " K-1"]:
    """Flow-matching loss of each learned split.

    The splits of stages 0 .. K - 2 are learned. The last split, of pairs, is not learned: either
    order is valid.

    Args:
        velocity: (noisy, time, structure embedding, canvas, stage) -> velocity, such as
            `StructureGenerator` with class ids and randomness bound. It is called once, on a batch
            of B * (K - 1) with the stages of an image adjacent.
        canvases: the canvas after each stage.
        noise: shared by the stages of an image.
        times: values in [0, 1].
        weights: per-image weights that sum to 1; None means uniform.
        teacher: what to learn instead of the structure of the images.
    """
    batch, stages, length = structure.shape
    num_bits, learned = stages - 1, stages - 2
    embedding = granularity.structure_embedding(structure, jnp.arange(stages), num_bits)
    target = embedding[:, -1].astype(jnp.float32) - 1
    fold = lambda x: x.reshape(batch * learned, *x.shape[2:])
    per_stage = lambda x: fold(jnp.broadcast_to(x[:, None], (batch, learned, length, num_bits)))
    stage = jnp.tile(jnp.arange(learned), batch)
    target = per_stage(target)
    condition = fold(embedding[:, :learned]), fold(canvases[:, :learned]), stage
    noise = per_stage(noise)
    if teacher and teacher.solution:
        target = jax.lax.stop_gradient(teacher.solution(noise, *condition))
    noisy, noise = flow.path(noise, target, fold(times), stage)
    goal = noise - target
    if teacher and teacher.velocity:
        unknown = ~flow.known_channels(stage, num_bits)
        goal = jax.lax.stop_gradient(teacher.velocity(noisy, fold(times), *condition)) * unknown
    predicted = velocity(noisy, fold(times), *condition)
    error = jnp.square(goal - predicted).mean((1, 2))
    return jnp.average(error.reshape(batch, learned), axis=0, weights=weights)


def draw_times(key: PRNGKeyArray, batch: int, learned: int) -> Float32[Array, "B learned"]:
    """Training times: sigmoid of a standard normal, per image and learned split."""
    return jax.nn.sigmoid(jax.random.normal(key, (batch, learned)))
