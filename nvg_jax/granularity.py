"""Structure maps: labels, their embedding, cluster means and splits.

A structure map of stage i gives each of the L positions the number (label) of one of the 2**i
clusters of that stage; every cluster has L / 2**i positions, and cluster j of stage i is made of
the clusters 2j and 2j+1 of stage i+1. The stages are numbered 0..K with L = 2**K.
Everything here is a pure function without parameters that works under `jit` and `vmap`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax


def num_stages(num_positions: int) -> int:
    """The number of stages S = K + 1 = log2(L) + 1 of a latent with L positions.

    Raises:
      ValueError: L is not a power of two, or less than 2.
    """
    if num_positions < 2 or num_positions & (num_positions - 1):
        raise ValueError(
            f"A latent with {num_positions} positions has no hierarchy of even halves: the number "
            "of positions (height x width of the latent) must be a power of two and at least 2, "
            "such as 4x4, 8x16 or 16x16. Choose another image size or number of downsamplings."
        )
    return num_positions.bit_length()


def structure_embedding(labels: Array, stage: int | Array, num_bits: int) -> Array:
    """The structure embedding of a map (Section 3.2 of the paper).

    Channel j < i holds bit j of the label, the most significant first, as 0 or 2; the channels
    j >= i hold 1. So it tells the stage, keeps parent and child together, and is a valid integer
    position for the rotary embedding.

    Args:
      labels: int (..., L), labels of stage i in 0..2**i-1.
      stage: i in 0..K; an integer, or an integer array that broadcasts to labels.shape[:-1].
      num_bits: K, the number of channels.

    Returns:
      int32 (..., L, K) with values 0, 1 and 2.
    """
    shift = _bit_shifts(stage, num_bits)
    bits = (labels[..., None] >> jnp.maximum(shift, 0)) & 1
    return jnp.where(shift >= 0, 2 * bits, 1).astype(jnp.int32)


def labels_from_embedding(embedding: Array, stage: int | Array) -> Array:
    """The inverse of `structure_embedding`: int (..., L, K), stage i -> int32 (..., L)."""
    shift = _bit_shifts(stage, embedding.shape[-1])
    bits = jnp.where(shift >= 0, embedding // 2, 0)
    return jnp.sum(bits << jnp.maximum(shift, 0), axis=-1).astype(jnp.int32)


def _bit_shifts(stage: int | Array, num_bits: int) -> Array:
    """Where channel j's bit stands in a label of stage i: i-1-j, negative for a padding channel."""
    return jnp.asarray(stage)[..., None, None] - 1 - jnp.arange(num_bits)


def all_stages(finest: Array) -> Array:
    """The maps of all stages: int (..., L), labels 0..L-1 of the finest one -> int (..., S, L)."""
    stages = num_stages(finest.shape[-1])
    return finest[..., None, :] >> jnp.arange(stages)[::-1, None]


def cluster_means(values: Array, labels: Array, num_clusters: int) -> Array:
    """The mean of the values of each cluster; differentiable in the values.

    Args:
      values: float (..., L, D).
      labels: int (..., L) in 0..num_clusters-1.
      num_clusters: N, may be more than there are labels in use.

    Returns:
      float32 (..., N, D), zero for a label that no position has.
    """
    members = jax.nn.one_hot(labels, num_clusters, dtype=jnp.float32)
    sums = jnp.einsum(
        "...ln,...ld->...nd", members, values.astype(jnp.float32), precision=lax.Precision.HIGHEST
    )
    return sums / jnp.maximum(jnp.sum(members, axis=-2), 1)[..., None]


def split(labels: Array, scores: Array, stage: int | Array, key: Array | None = None) -> Array:
    """Splits every cluster of stage i evenly into two clusters of stage i+1.

    Within cluster j the half of the positions with the larger scores becomes cluster 2j+1, the
    other half cluster 2j. Of equal scores the one at the smaller position counts as larger; NaN
    counts as -inf. The split is exactly even whatever the scores are.

    With a key the half is drawn without replacement (Gumbel top-k), a position with score s with a
    probability proportional to clip(s, -1, 1) + 1; those of probability zero follow in the order
    of their scores.

    Args:
      labels: int (..., L), a map of stage i with clusters of equal size.
      scores: float (..., L).
      stage: i in 0..K-1, an integer or a traced scalar.
      key: None, or a random key for all of `scores`. `vmap` over samples and keys makes a
        sample's split independent of its batch.

    Returns:
      int32 (..., L), a map of stage i+1.
    """
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores.astype(jnp.float32))
    first_by = scores
    if key is not None:
        first_by = jnp.log(jnp.clip(scores, -1, 1) + 1) + jax.random.gumbel(key, scores.shape)
    # The rank of a position in its cluster is the number of positions of the cluster before it.
    # Counting them pairwise took a third of the time of a sort (L = 256, CPU).
    position = jnp.arange(labels.shape[-1])
    before = position < position[:, None]
    for order in (scores, first_by):
        this, other = order[..., :, None], order[..., None, :]
        before = (other > this) | ((other == this) & before)
    together = labels[..., :, None] == labels[..., None, :]
    rank = jnp.sum(together & before, axis=-1)
    odd = rank < labels.shape[-1] >> (stage + 1)
    return (2 * labels + odd).astype(jnp.int32)


def is_even_hierarchy(labels: Array) -> Array:
    """Whether the maps of all stages are a hierarchy of exact halves.

    That is: every label 0..2**i-1 of stage i is used at exactly L / 2**i positions, and half the
    label (rounded down) of stage i+1 is the label of stage i.

    Args:
      labels: int (..., S, L).

    Returns:
      bool (...), false everywhere when S is not log2(L) + 1.

    Raises:
      ValueError: L is not a power of two.
    """
    *_, stages, num_positions = labels.shape
    all_stages = stages == num_stages(num_positions)
    finest = jnp.sort(labels[..., -1, :], axis=-1)
    each_once = jnp.all(finest == jnp.arange(num_positions), axis=-1)
    nested = jnp.all(labels[..., 1:, :] // 2 == labels[..., :-1, :], axis=(-2, -1))
    return all_stages & each_once & nested


def check_structure(structure: np.ndarray):
    """Checks maps that a user gives.

    Args:
        structure: int (B, stages, L), the maps of the first stages.

    Raises:
        ValueError: a map that does not split every cluster j of the stage before evenly into
            2j and 2j+1; names the stage.
    """
    length = structure.shape[2]
    for stage in range(structure.shape[1]):
        size = length >> stage
        even = np.sort(structure[:, stage]) == np.arange(length) // size
        split = stage == 0 or (structure[:, stage] // 2 == structure[:, stage - 1]).all()
        if not (even.all() and split):
            raise ValueError(
                f"The structure map of stage {stage} must use each label 0 .. {2**stage - 1} at "
                f"exactly {size} positions and split every cluster j of the stage before into 2j "
                "and 2j+1."
            )


def check_tokens(structure: np.ndarray, tokens: np.ndarray, codebook_size: int):
    """Checks tokens that a user gives.

    Args:
        structure, tokens: int (B, stages, L), of the first stages; the maps are valid.

    Raises:
        ValueError: ids outside the codebook, or ids that differ within a cluster.
    """
    if tokens.size and not (0 <= tokens.min() and tokens.max() < codebook_size):
        raise ValueError(
            f"Token ids must be in 0 .. {codebook_size - 1}, got {tokens.min()} .. {tokens.max()}."
        )
    for stage in range(tokens.shape[1]):
        first = np.zeros((len(tokens), 2**stage), np.int64)
        np.put_along_axis(first, structure[:, stage], tokens[:, stage], axis=1)
        shared = np.take_along_axis(first, structure[:, stage], axis=1)
        if (shared != tokens[:, stage]).any():
            raise ValueError(
                f"The tokens of stage {stage} differ within a cluster; all positions of a cluster "
                "must hold the same token id."
            )
