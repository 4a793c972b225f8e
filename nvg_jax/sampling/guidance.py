"""Classifier-free guidance and the filters of the token distribution."""

import jax
import jax.numpy as jnp


def guided(network, class_ids, null_id: int, scale):
    """A network's output moved away from the null class: null + scale * (cond - null).

    Args:
        network: (doubled, class_ids (2B,)) -> (2B, ...), where doubled(x) repeats each row of a
            (B, ...) array, for the class and for the null class. So both stay where the row is
            when a batch is split over devices.
        scale: None for no guidance at all (the null branch is not computed), else a scalar.
    """
    if scale is None:
        return network(lambda x: x, class_ids)
    classes = jnp.stack([class_ids, jnp.full_like(class_ids, null_id)], axis=1)
    both = network(lambda x: jnp.repeat(x, 2, axis=0), classes.ravel())
    both = both.reshape(len(class_ids), 2, *both.shape[1:])
    cond, null = both[:, 0], both[:, 1]
    return null + scale * (cond - null)


def filter_logits(logits, top_k=None, top_p=None):
    """Sets to -inf what top-k and then top-p (nucleus) leave out; the best token always stays.

    Args:
        logits: float32 (..., V).
        top_k: int scalar, may be traced; 0 keeps all; None leaves the filter out of the program.
        top_p: float scalar in (0, 1], may be traced; None leaves the filter out. Tokens are left
            out from the least likely on while their probabilities together are at most 1 - top_p.
    """
    vocabulary = logits.shape[-1]
    if top_k is not None:
        ascending = jnp.sort(logits, axis=-1)
        rank = jnp.where(top_k > 0, vocabulary - jnp.minimum(top_k, vocabulary), 0)
        logits = jnp.where(logits < ascending[..., rank, None], -jnp.inf, logits)
    if top_p is not None:
        ascending = jnp.sort(logits, axis=-1)
        left_out = jnp.cumsum(jax.nn.softmax(ascending), axis=-1) <= 1 - top_p
        first = jnp.minimum(left_out.sum(-1, keepdims=True), vocabulary - 1)
        threshold = jnp.take_along_axis(ascending, first, axis=-1)
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    return logits
