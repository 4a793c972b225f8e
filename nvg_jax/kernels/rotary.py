"""Normalizes and rotates queries and keys, in the form that each platform computes fastest."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from nvg_jax.runtime import hardware

EPSILON = 1e-6


class Rotary(NamedTuple):
    """How queries and keys are normalized and rotated before they are multiplied.

    q_scale, k_scale: float32 (head_dim,), the learned scales of the RMS normalizations.
    cos, sin: float32 (B, N, head_dim / 2), from `layers.rope_angles`.
    """

    q_scale: Array
    k_scale: Array
    cos: Array
    sin: Array


def normalize_and_rotate(q: Array, k: Array, rotary: Rotary) -> tuple[Array, Array]:
    """The queries and keys to multiply; all arrays are (B, N, heads, head_dim)."""
    q, k = (
        rotate(rms_norm(x, scale), rotary.cos, rotary.sin)
        for x, scale in ((q, rotary.q_scale), (k, rotary.k_scale))
    )
    return q, k


def rms_norm(x: Array, scale: Array) -> Array:
    """RMS normalization of each head (..., head_dim) with a learned scale, in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + EPSILON)
    return (y * scale).astype(x.dtype)


@jax.custom_vjp
def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the interleaved channel pairs of x (B, N, heads, head_dim).

    Each pair (even, odd) becomes (cos * even - sin * odd, sin * even + cos * odd).

    Args:
        x: float (B, N, heads, head_dim).
        cos, sin: float32 (B, N, head_dim / 2), from `layers.rope_angles`.
    """
    cos, sin = cos[:, :, None], sin[:, :, None]
    if hardware.platform() == "tpu":
        return _rotate_by_product(x, cos, sin)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    if hardware.platform() == "gpu":
        cos, sin, even, odd = cos[..., None], sin[..., None], pairs[..., :1], pairs[..., 1:]
        turned = cos * pairs + sin * jnp.where(np.array([True, False]), -odd, even)
    else:
        even, odd = pairs[..., 0], pairs[..., 1]
        turned = jnp.stack([cos * even - sin * odd, sin * even + cos * odd], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


# The gradient rotates back. The positions, and therefore the angles, are constants.
rotate.defvjp(
    lambda x, cos, sin: (rotate(x, cos, sin), (cos, sin)),
    lambda angles, grad: (rotate(grad, angles[0], -angles[1]), None, None),
)


def _rotate_by_product(x: Array, cos: Array, sin: Array) -> Array:
    """`rotate` for a TPU: swaps the channels of each pair by an exact product with a fixed matrix.

    Slicing them apart would account for a quarter of the memory traffic of a block.
    """
    even = np.arange(0, x.shape[-1], 2)
    swap = np.zeros((x.shape[-1],) * 2, np.float32)
    swap[even + 1, even], swap[even, even + 1] = -1, 1
    partner = jnp.einsum(
        "bnhc,cd->bnhd", x, swap.astype(x.dtype), precision=jax.lax.Precision.HIGHEST
    )
    cos, sin = jnp.repeat(cos, 2, axis=-1), jnp.repeat(sin, 2, axis=-1)
    turned = cos * x.astype(jnp.float32) + sin * partner.astype(jnp.float32)
    return turned.astype(x.dtype)
