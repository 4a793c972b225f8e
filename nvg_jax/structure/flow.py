"""The rectified flow of the structure generator: path, target, schedule, solver; no network.

The flow leads from noise (t = 1) to the finest structure embedding minus 1 (t = 0), float32
(B, L, K). Channel j of the embedding is bit j of the labels, so at stage i the map of the stage
already fixes channels j < i: they are known, and only the others are generated.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Float64, Int

SOLVERS = {"euler": 1, "heun": 2, "multistep": 1}  # {name: calls of the velocity per step}


def shifted_times(
    num_steps: int, num_positions: int, shift: float = 0.0
) -> Float64[np.ndarray, " times"]:
    """The n + 1 times of the solver, from 1 down to 0.

    Evenly spaced times t become shift * t / (1 + (shift - 1) * t).

    Args:
        shift: 1 keeps the times evenly spaced; larger values put more steps at the noisy end. 0
            means the published e^mu, with mu linear in L through (256, 0.5) and (4096, 1.15).
    """
    shift = shift or math.exp(0.5 + (1.15 - 0.5) * (num_positions - 256) / (4096 - 256))
    t = np.linspace(1.0, 0.0, num_steps + 1)
    return shift * t / (shift * t + 1 - t)


def call_times(times: Float[Array, " times"], solver: str) -> Float[Array, " calls"]:
    """The times at which `solve` calls the velocity: all n + 1, or all but the last."""
    return times if solver == "heun" else times[:-1]


def known_channels(stage: int | Int[Array, "*batch"], num_bits: int) -> Bool[Array, "*batch 1 K"]:
    """The channels that the map of stage i already fixes: the first i of K (`num_bits`)."""
    return jnp.arange(num_bits) < jnp.asarray(stage)[..., None, None]


def path(
    noise: Float[Array, "B L K"],
    target: Float[Array, "B L K"],
    time: Float[Array, " B"],
    stage: Int[Array, " B"],
) -> tuple[Float[Array, "B L K"], Float[Array, "B L K"]]:
    """The point z_t between noise (t = 1) and target (t = 0), and the noise used for it.

    In the known channels the noise is replaced by the target, so z_t equals the target at all t.

    Args:
        target: the finest structure embedding minus 1.
        time: values in [0, 1].
        stage: the stage that is split.

    Returns:
        (z_t, noise); the velocity to learn is noise - target.
    """
    noise = jnp.where(known_channels(stage, noise.shape[-1]), target, noise)
    time = time[:, None, None]
    return time * noise + (1 - time) * target, noise


def solve(
    velocity: Callable[[Float[Array, "B L K"], Any], Float[Array, "B L K"]],
    noise: Float[Array, "B L K"],
    known: Float[Array, "B L K"],
    stage: int | Int[Array, "..."],
    times: Float[Array, " times"],
    kept: tuple[Bool[Array, "B L"], Float[Array, "B L K"]] | None = None,
    solver: str = "euler",
    per_time: Any = None,
    start: Float[Array, "B L K"] | None = None,
) -> Float[Array, "B L K"]:
    """Integrates from noise to a structure; resets the known channels after every step.

    "euler" uses the velocity at the start of a step. "heun" uses the mean of the velocities at the
    start and at the end point of an Euler step, so it calls `velocity` twice. "multistep" is second
    order with one call: like DPM-Solver++ (Lu et al., arXiv 2211.01095), it extrapolates the
    predicted structure z - t v, here linearly in t, and integrates it exactly.

    Args:
        velocity: (z, time) -> the velocity at z.
        known: the structure embedding of the stage minus 1, which holds the values of the known
            channels.
        stage: one for all images, or one for each.
        times: decreasing to 0, from 1 unless there is a `start`.
        kept: None, or (positions, target): these positions follow the path to a known target
            instead of the velocity.
        solver: one of `SOLVERS`.
        per_time: None, or arrays (n or n + 1, ...) over `call_times`: `velocity` gets their entry
            instead of the time.
        start: None, or a structure embedding minus 1: z then starts on the path to it, at times[0].

    Returns:
        The structure embedding minus 1 at t = 0, not rounded.
    """
    mask = known_channels(stage, noise.shape[-1])

    def reset(z, time):
        if kept is not None:
            positions, target = kept
            z = jnp.where(positions[..., None], time * noise + (1 - time) * target, z)
        return jnp.where(mask, known, z)

    def euler(z, interval):
        start, end, at_start = interval
        return reset(z + (end - start) * velocity(z, at_start), end), None

    def heun(z, interval):
        start, end, at_start, at_end = interval
        first = velocity(z, at_start)
        second = velocity(reset(z + (end - start) * first, end), at_end)
        return reset(z + (end - start) * (first + second) / 2, end), None

    def multistep(carry, interval):
        z, last, slope_scale = carry
        start, end, at_start, before = interval
        predicted = z - start * velocity(z, at_start)
        # dz/dt = (z - s(t)) / t, with s(t) linear through the last two predictions.
        slope = slope_scale * (predicted - last) / (start - before)
        curve = jax.scipy.special.xlogy(end, start / jnp.where(end > 0, end, 1)) - start + end
        z = end / start * z + (1 - end / start) * predicted + curve * slope
        return (reset(z, end), predicted, 1.0), None

    z = noise if start is None else times[0] * noise + (1 - times[0]) * start
    z, starts, ends = reset(z, times[0]), times[:-1], times[1:]
    if per_time is None:
        per_time = call_times(times, solver)
    if solver == "heun":
        between = (jax.tree.map(lambda x: x[cut], per_time) for cut in (np.s_[:-1], np.s_[1:]))
        return jax.lax.scan(heun, z, (starts, ends, *between))[0]
    if solver == "multistep":  # the first step has no slope yet and is an Euler step
        before = jnp.concatenate([times[:1] + 1, times[:-2]])
        return jax.lax.scan(multistep, (z, z, 0.0), (starts, ends, per_time, before))[0][0]
    return jax.lax.scan(euler, z, (starts, ends, per_time))[0]
