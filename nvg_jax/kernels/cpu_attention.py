"""Attention for CPUs: batch and heads are folded into one axis."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

LENGTH_BY_HEAD = 256  # from this length on, one head at a time is faster (measured on 2 cores)


def folded_attention(
    q: Float[Array, "B N heads head_dim"],
    k: Float[Array, "B N heads head_dim"],
    v: Float[Array, "B N heads head_dim"],
    by_head: bool = False,
) -> Float[Array, "B N heads head_dim"]:
    """Attention, scaled by 1 / sqrt(head_dim).

    The softmax denominator is applied after the product with the values. Heads that are sharded
    over "tensor" cannot be folded in place.

    Args:
        by_head: process one head of one image at a time, so that its scores stay in the CPU cache.
            The images must not be sharded.
    """
    batch, length, heads, head_dim = q.shape
    q, k, v = (x.transpose(0, 2, 1, 3).reshape(batch * heads, length, head_dim) for x in (q, k, v))
    attend = jax.vmap(_attend)
    if by_head:
        # A batch axis of one: otherwise remat policy `linears` would save these products.
        q, k, v = (x[:, None] for x in (q, k, v))
        out = jax.lax.map(lambda head: attend(*head), (q, k, v))
    else:
        out = attend(q, k, v)
    return out.reshape(batch, heads, length, head_dim).transpose(0, 2, 1, 3)


def _attend(
    q: Float[Array, "N head_dim"], k: Float[Array, "N head_dim"], v: Float[Array, "N head_dim"]
) -> Float[Array, "N head_dim"]:
    """Attention of one head."""
    scores = ((q * q.shape[-1] ** -0.5) @ k.T).astype(jnp.float32)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    return weights.astype(v.dtype) @ v / weights.sum(-1, keepdims=True).astype(v.dtype)
