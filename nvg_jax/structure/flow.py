"""The rectified flow of the structure generator: path, target, schedule, solver; no network.

The flow leads from noise (t = 1) to the finest structure embedding minus 1 (t = 0), float32
(B, L, K). Channel j of the embedding is bit j of the labels, so at stage i the map of the stage
already fixes channels j < i: they are known, and only the others are generated.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def shifted_times(num_steps: int, num_positions: int) -> np.ndarray:
    """The n + 1 times of the solver, from 1 down to 0, float64.

    Evenly spaced times t become e^mu / (e^mu + 1/t - 1), with mu linear in L through (256, 0.5) and
    (4096, 1.15).

    Raises:
        ValueError: num_steps is less than 1.
    """
    if num_steps < 1:
        raise ValueError(f"The flow needs at least one step, got flow_steps={num_steps}.")
    mu = 0.5 + (1.15 - 0.5) * (num_positions - 256) / (4096 - 256)
    t = np.linspace(1.0, 0.0, num_steps + 1)
    return math.exp(mu) * t / (math.exp(mu) * t + 1 - t)


def known_channels(stage: int | Array, num_bits: int) -> Array:
    """bool (..., 1, K): the channels that the map of a stage already fixes.

    Args:
        stage: i, int (...); the map of stage i fixes the first i channels.
        num_bits: K.
    """
    return jnp.arange(num_bits) < jnp.asarray(stage)[..., None, None]


def path(noise: Array, target: Array, time: Array, stage: Array) -> tuple[Array, Array]:
    """The point z_t between noise (t = 1) and target (t = 0), and the noise used for it.

    In the known channels the noise is replaced by the target, so z_t equals the target at all t.

    Args:
        noise, target: float32 (B, L, K); the target is the finest structure embedding minus 1.
        time: float32 (B,) in [0, 1].
        stage: int32 (B,), the stage that is split.

    Returns:
        (z_t, noise), both float32 (B, L, K); the velocity to learn is noise - target.
    """
    noise = jnp.where(known_channels(stage, noise.shape[-1]), target, noise)
    time = time[:, None, None]
    return time * noise + (1 - time) * target, noise


def solve(
    velocity: Callable[[Array, Array], Array],
    noise: Array,
    known: Array,
    stage: int | Array,
    times: Array,
    kept: tuple[Array, Array] | None = None,
) -> Array:
    """Euler steps from noise to a structure; resets the known channels after every step.

    Args:
        velocity: (z float32 (B, L, K), time scalar) -> float32 (B, L, K).
        noise: float32 (B, L, K).
        known: float32 (B, L, K), the structure embedding of the stage minus 1, which holds the
            values of the known channels.
        stage: int scalar, may be traced.
        times: float32 (n + 1,), decreasing from 1 to 0.
        kept: None, or (bool (B, L), target float32 (B, L, K)): the positions that follow the path
            to a known target instead of the velocity.

    Returns:
        float32 (B, L, K), the structure embedding minus 1 at t = 0, not rounded.
    """
    mask = known_channels(stage, noise.shape[-1])

    def reset(z, time):
        if kept is not None:
            positions, target = kept
            z = jnp.where(positions[..., None], time * noise + (1 - time) * target, z)
        return jnp.where(mask, known, z)

    def step(z, interval):
        start, end = interval
        return reset(z + (end - start) * velocity(z, start), end), None

    start = reset(noise, times[0])
    return jax.lax.scan(step, start, (times[:-1], times[1:]))[0]
