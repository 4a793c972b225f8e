"""The rectified flow of the structure generator: path, target, schedule, solver. No network."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def shifted_times(num_steps: int, num_positions: int) -> np.ndarray:
    """The n + 1 times of the solver from 1 down to 0, float64.

    t' = e^mu / (e^mu + 1/t - 1) with mu linear in L through (256, 0.5) and (4096, 1.15).
    """
    if num_steps < 1:
        raise ValueError(f"The flow needs at least one step, got flow_steps={num_steps}.")
    mu = 0.5 + (1.15 - 0.5) * (num_positions - 256) / (4096 - 256)
    t = np.linspace(1.0, 0.0, num_steps + 1)
    return math.exp(mu) * t / (math.exp(mu) * t + 1 - t)


def known_channels(stage, num_bits: int):
    """bool (..., 1, K): the bits that the maps of stage(s) `stage` (...) have already decided."""
    return jnp.arange(num_bits) < jnp.asarray(stage)[..., None, None]


def path(noise, target, time, stage):
    """The point z_t between noise (t = 1) and target (t = 0), and the noise that leads there.

    Args:
        noise, target: float32 (B, L, K); the target is the full structure embedding minus 1.
        time: float32 (B,) in [0, 1].
        stage: int32 (B,); channels below it are known: there the noise is the target.

    Returns:
        (z_t, noise), both float32 (B, L, K); the velocity to learn is noise - target.
    """
    noise = jnp.where(known_channels(stage, noise.shape[-1]), target, noise)
    time = time[:, None, None]
    return time * noise + (1 - time) * target, noise


def solve(velocity, noise, known, stage, times):
    """Euler steps from noise to a structure, the known channels put back after every step.

    Args:
        velocity: (z float32 (B, L, K), time scalar) -> float32 (B, L, K).
        noise: float32 (B, L, K).
        known: float32 (B, L, K), structure embedding of the stage minus 1.
        stage: int scalar, may be traced.
        times: float32 (n + 1,), falling from 1 to 0.
    """
    mask = known_channels(stage, noise.shape[-1])

    def step(z, interval):
        start, end = interval
        z = z + (end - start) * velocity(z, start)
        return jnp.where(mask, known, z), None

    start = jnp.where(mask, known, noise)
    return jax.lax.scan(step, start, (times[:-1], times[1:]))[0]
