"""Classifier-free guidance and the filters of the token distribution."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Shaped


class Guidance:
    """Moves a network's output away from the null class: null + scale * (cond - null).

    The network runs on a batch in which every row appears twice, for its class and for the null
    class. The copies are adjacent, so sharding the batch keeps them on one device.

    Attributes:
        classes: the classes of that batch.

    Args:
        scale: broadcasts to the output; None disables guidance, and the null class is not computed.
    """

    classes: Int[Array, " rows"]

    def __init__(
        self, class_ids: Int[Array, " B"], null_id: int, scale: float | Float[Array, "..."] | None
    ):
        self.classes, self._scale = class_ids, scale
        if scale is not None:
            nulls = jnp.full_like(class_ids, null_id)
            self.classes = jnp.stack([class_ids, nulls], axis=1).ravel()

    def double(self, x: Shaped[Array, " B *rest"]) -> Shaped[Array, " rows *rest"]:
        """The rows of the network's batch: 2B, or B without guidance."""
        return x if self._scale is None else jnp.repeat(x, 2, axis=0)

    def __call__(self, output: Float[Array, " rows *rest"]) -> Float[Array, " B *rest"]:
        """The guided output."""
        if self._scale is None:
            return output
        output = output.reshape(-1, 2, *output.shape[1:])
        cond, null = output[:, 0], output[:, 1]
        return null + self._scale * (cond - null)


def filter_logits(
    logits: Float[Array, "*batch V"],
    top_k: int | Int[Array, ""] | None = None,
    top_p: float | Float[Array, ""] | None = None,
) -> Float[Array, "*batch V"]:
    """Applies top-k, then top-p (nucleus): sets other logits to -inf; always keeps the best token.

    Args:
        top_k: 0 keeps all; None leaves the filter out of the program.
        top_p: in (0, 1]; None leaves the filter out. Tokens are dropped, starting with the least
            likely, while their total probability is at most 1 - top_p.
    """
    if top_k is not None:
        vocabulary = logits.shape[-1]
        count = jnp.where(top_k > 0, jnp.minimum(top_k, vocabulary), vocabulary)
        logits = _keep_top(logits, lambda low: (~low).sum(-1, keepdims=True) < count)
    if top_p is not None:
        probabilities = jax.nn.softmax(logits)
        left_out = lambda low: jnp.where(low, probabilities, 0).sum(-1, keepdims=True)
        logits = _keep_top(logits, lambda low: left_out(low) > 1 - top_p)
    return logits


def _keep_top(
    logits: Float[Array, "*batch V"],
    enough: Callable[[Bool[Array, "*batch V"]], Bool[Array, "*batch 1"]],
) -> Float[Array, "*batch V"]:
    """Sets logits below a threshold to -inf: the lowest x for which enough(logits <= x) holds.

    Bisects over the bits: on a CPU, sorting takes five times as long.

    Args:
        enough: must be monotonic in x, and is assumed to hold for the highest logit.
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    # Integers in the order of the floats; 0.0 equals -0.0 (the lowest integer).
    order = jnp.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    def halve(_, bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        holds = enough(order <= middle)
        return jnp.where(holds, low, middle + 1), jnp.where(holds, middle, high)

    bounds = order.min(-1, keepdims=True), order.max(-1, keepdims=True)
    _, lowest = jax.lax.fori_loop(0, 32, halve, bounds)
    return jnp.where(order < lowest, -jnp.inf, logits)
