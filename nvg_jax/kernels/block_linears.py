"""Both linear layers of a transformer block, in the form that each platform computes fastest.

The paper's block has one linear layer from its input to [q k v | hidden] and one from
[attention | gelu(hidden)] to its output. `form` says how many products compute each of them.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from nvg_jax.runtime import hardware
from nvg_jax.runtime.sharding import constrain, tensor_shards, unshard

Channels = Float[Array, "B N C"]


def form(tokens: int, width: int) -> str:
    """How the linear layers of a block with B * N tokens of C channels are computed.

    "joint": one product per layer, the fewest kernels. For few tokens on a GPU, starting kernels
        and moving weights takes longer than the arithmetic, and XLA would join separate products
        itself, with a copy of their weights.
    "separate": one product each for queries, keys, values and hidden channels. The hidden channels
        are one axis: they are not transposed in the backward pass (on a CPU, a quarter of the time
        of a wide block), and XLA for GPUs can compute product, bias and GELU as one kernel.
    "parts": the same, with the hidden channels as parts of C channels, so that the "tensor" mesh
        axis shards within each part, and attention by whole heads. For a TPU it has 2% less memory
        traffic than "separate". Slicing a joint product and concatenating the next input would
        account for a third of the memory traffic there.
    """
    platform = hardware.platform()
    if tensor_shards() > 1 or platform == "tpu":
        return "parts"
    return "joint" if platform == "gpu" and tokens <= 4 * width else "separate"


def add_bias(y: Float[Array, "*all"], bias: Float[Array, "*last"]) -> Float[Array, "*all"]:
    """y + bias in the dtype of y; the bias's gradient is summed in float32 and rounded once."""
    return y + jnp.broadcast_to(bias.astype(jnp.float32), y.shape).astype(y.dtype)


@jax.custom_vjp
def gated(gate: Float[Array, "B 1 C"], y: Channels) -> Channels:
    """gate * y; the gate's gradient is summed in float32 and rounded once."""
    return gate * y


def _gate_gradients(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    gate, y = saved
    products = g.astype(jnp.float32) * y.astype(jnp.float32)
    return products.sum(1, keepdims=True).astype(gate.dtype), gate * g


gated.defvjp(lambda gate, y: (gate * y, (gate, y)), _gate_gradients)


def linear1(
    x: Channels, kernel: Float[Array, "C features"], bias: Float[Array, " features"]
) -> tuple[Channels, Channels, Channels, Float[Array, "B N *hidden"]]:
    """Queries, keys, values and hidden channels of x.

    Args:
        kernel, bias: unsharded, with (3 + r) C features, r the MLP ratio.

    Returns:
        (q, k, v, hidden); hidden is (B, N, r, C) in the form "parts", else (B, N, r C).
    """
    width = x.shape[-1]
    how = form(math.prod(x.shape[:-1]), width)
    if how == "joint":
        q, k, v, hidden = jnp.split(
            add_bias(x @ kernel, bias), (width, 2 * width, 3 * width), axis=-1
        )
        return q, k, v, hidden
    parts = len(bias) // width
    kernel = unshard(kernel.reshape(width, parts, width), (None, None, "mlp"))
    bias = unshard(bias.reshape(parts, width), (None, "mlp"))
    q, k, v = (
        constrain(
            add_bias(jnp.einsum("bnc,cd->bnd", x, kernel[:, part]), bias[part]),
            ("batch", "length", "mlp"),
        )
        for part in range(3)
    )
    if how == "separate":
        equation, shape, axes = "bnc,cd->bnd", (-1,), ("mlp",)
    else:
        equation, shape, axes = "bnc,cpd->bnpd", (-1, width), (None, "mlp")
    hidden = jnp.einsum(equation, x, kernel[:, 3:].reshape(width, *shape))
    hidden = add_bias(hidden, bias[3:].reshape(shape))
    return q, k, v, constrain(hidden, ("batch", "length", *axes))


def linear2(
    attended: Channels,
    hidden: Float[Array, "B N *hidden"],
    gate: Float[Array, "B 1 C"],
    kernel: Float[Array, "features C"],
    bias: Float[Array, " C"],
) -> Channels:
    """The gated output of a block.

    Args:
        hidden: activated hidden channels, in the shape that `linear1` returns.
        kernel, bias: unsharded, with (1 + r) C features, r the MLP ratio.
    """
    width = attended.shape[-1]
    how = form(math.prod(attended.shape[:-1]), width)
    if how == "joint":
        return gated(gate, add_bias(jnp.concatenate([attended, hidden], axis=-1) @ kernel, bias))
    kernel = unshard(kernel.reshape(-1, width, width), (None, "mlp", None))
    # Gate each product separately: for a batch of one, XLA:CPU (jax 0.10) otherwise fuses their sum
    # into the gate's gradient and gets it wrong.
    out = gated(gate, jnp.einsum("bnd,dc->bnc", attended, kernel[0]))
    equation = "bnd,dc->bnc" if how == "separate" else "bnpd,pdc->bnc"
    kernel = kernel[1:].reshape(*hidden.shape[2:], width)
    return out + gated(gate, add_bias(jnp.einsum(equation, hidden, kernel), bias))
