"""Softmax attention over whole sequences: chooses the implementation for each platform.

Our own kernel on TPUs, cuDNN's on GPUs, and the fastest of several forms on CPUs.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from nvg_jax.kernels.cpu_attention import LENGTH_BY_HEAD, folded_attention
from nvg_jax.kernels.rotary import Rotary, normalize_and_rotate
from nvg_jax.kernels.tpu_attention import fits_kernel, fused_attention
from nvg_jax.runtime import hardware
from nvg_jax.runtime.sharding import tensor_shards


def attention(
    q: Float[Array, "B N heads head_dim"],
    k: Float[Array, "B N heads head_dim"],
    v: Float[Array, "B N heads head_dim"],
    rotary: Rotary | None = None,
    length: int | None = None,
) -> Float[Array, "B N heads head_dim"]:
    """Softmax attention over the whole sequence, without a mask, scaled by 1 / sqrt(head_dim).

    Args:
        rotary: None uses q and k unchanged.
        length: the number of tokens that are attended to; None means all N. The others, at the end,
            are padding, see `padded_length`.
    """
    platform = hardware.platform()
    if platform == "tpu" and length is None and fits_kernel(q):
        return fused_attention(q, k, v, rotary)
    if rotary is not None:
        q, k = normalize_and_rotate(q, k, rotary)
    if platform == "cpu" and tensor_shards() == 1 and length is None:
        mesh = jax.sharding.get_abstract_mesh()
        by_head = q.shape[1] >= LENGTH_BY_HEAD and mesh.size <= 1  # 0: no mesh
        return folded_attention(q, k, v, by_head)
    count = q.shape[1]
    padding = padded_length(len(q), count, q.dtype, q.shape[-1]) - count
    if padding:
        q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
        length = length or count
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        key_value_seq_lengths=None if length is None else jnp.full(len(q), length, jnp.int32),
        implementation="cudnn" if fits_cudnn(q.dtype, q.shape[-1]) else None,
    )
    return out[:, :count]


def padded_length(batch: int, length: int, dtype: DTypeLike, head_dim: int) -> int:
    """The length to which `attention` pads sequences on GPUs.

    cuDNN's gradient needs an even length, and XLA would pad the operands of every matrix product to
    a multiple of eight tokens. Padding q, k and v copies them, so a transformer pads its tokens
    once, before all blocks.
    """
    if not fits_cudnn(dtype, head_dim):
        return length
    return length + -length % (8 // math.gcd(batch, 4))


def fits_cudnn(dtype: DTypeLike, head_dim: int) -> bool:
    """Whether cuDNN's kernel supports such heads on this platform."""
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    return half and head_dim % 8 == 0 and head_dim <= 128 and hardware.ampere_or_later()
