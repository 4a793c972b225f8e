"""Normalizes and rotates queries and keys, in the form that each platform computes fastest."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float32

from nvg_jax.runtime import hardware

EPSILON = 1e-6


class Rotary(NamedTuple):
    """How queries and keys are normalized and rotated before they are multiplied.

    q_scale, k_scale: the learned scales of the RMS normalizations.
    cos, sin: the angle of each pair of channels, from `layers.rope_angles`.
    """

    q_scale: Float32[Array, " head_dim"]
    k_scale: Float32[Array, " head_dim"]
    cos: Float32[Array, "B N pairs"]
    sin: Float32[Array, "B N pairs"]


def normalize_and_rotate(
    q: Float[Array, "B N heads head_dim"], k: Float[Array, "B N heads head_dim"], rotary: Rotary
) -> tuple[Float[Array, "B N heads head_dim"], Float[Array, "B N heads head_dim"]]:
    """The queries and keys to multiply."""
    q, k = (
        rotate(rms_norm(x, scale), rotary.cos, rotary.sin)
        for x, scale in ((q, rotary.q_scale), (k, rotary.k_scale))
    )
    return q, k


def rms_norm(
    x: Float[Array, "*batch head_dim"], scale: Float[Array, " head_dim"]
) -> Float[Array, "*batch head_dim"]:
    """RMS normalization of each head with a learned scale, in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + EPSILON)
    return (y * scale).astype(x.dtype)


@jax.custom_vjp
def rotate(
    x: Float[Array, "B N heads head_dim"],
    cos: Float[Array, "B N pairs"],
    sin: Float[Array, "B N pairs"],
) -> Float[Array, "B N heads head_dim"]:
    """Rotates the interleaved channel pairs of x.

    Each pair (even, odd) becomes (cos * even - sin * odd, sin * even + cos * odd).
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


def _rotate_by_product(
    x: Float[Array, "B N heads head_dim"],
    cos: Float[Array, "B N 1 pairs"],
    sin: Float[Array, "B N 1 pairs"],
) -> Float[Array, "B N heads head_dim"]:
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
