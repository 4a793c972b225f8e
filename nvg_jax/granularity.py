"""Structure maps: labels, their embedding, cluster means and splits.

The structure map of stage i assigns each of the L positions a label in 0..2**i-1, the index of its
cluster. Every cluster of the stage has L / 2**i positions, and cluster j of stage i is the union
of clusters 2j and 2j+1 of stage i+1. Stages are numbered 0..K, with L = 2**K.
All functions are pure and have no parameters. Those of JAX arrays work under `jit` and `vmap`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Float32, Int, Int32, PRNGKeyArray

from nvg_jax.errors import UserError


def num_stages(num_positions: int) -> int:
    """The number of stages S = K + 1 = log2(L) + 1 of a latent with L positions.

    Raises:
        UserError: L is not a power of two, or is less than 2.
    """
    if num_positions < 2 or num_positions & (num_positions - 1):
        raise UserError(
            f"A latent with {num_positions} positions cannot be halved down to single positions: "
            "the number of positions (height x width of the latent) must be a power of two and at "
            "least 2, such as 4x4, 8x16 or 16x16. Choose another image size or number of "
            "downsamplings."
        )
    return num_positions.bit_length()


def structure_embedding(
    maps: Int[Array, "*batch L"], stage: int | Int[Array, "..."], num_bits: int
) -> Int32[Array, "*batch L K"]:
    """The structure embedding of maps (Section 3.2 of the paper).

    Channels j < i hold bit j of the label, most significant bit first, as 0 or 2; channels j >= i
    hold 1. The embedding therefore identifies the stage, keeps parent and child close, and is a
    valid integer position for the rotary embedding.

    Args:
        maps: maps of stage i, labels in 0..2**i-1.
        stage: i in 0..K; an array broadcasts to maps.shape[:-1].
        num_bits: K, the number of channels.

    Returns:
        Values 0, 1 and 2.
    """
    # Shift of a label that reads the bit of channel j; negative for a padding channel.
    shift = jnp.asarray(stage)[..., None, None] - 1 - jnp.arange(num_bits)
    bits = (maps[..., None] >> jnp.maximum(shift, 0)) & 1
    return jnp.where(shift >= 0, 2 * bits, 1).astype(jnp.int32)


def all_stages(finest: Int[Array | np.ndarray, "*batch L"]) -> Int[Array, "*batch S L"]:
    """The maps of all stages, from the labels 0..L-1 of the finest one."""
    stages = num_stages(finest.shape[-1])
    return jnp.asarray(finest)[..., None, :] >> jnp.arange(stages)[::-1, None]


def grid_structure(grid: tuple[int, int]) -> Int32[np.ndarray, "S L"]:
    """The maps of all stages that halve the blocks of a grid, with the smaller sides as cuts.

    Squares are cut into an upper and a lower half, so of a square grid, every second stage has the
    square blocks of next-scale prediction. The upper or left half of block j becomes block 2j.

    Args:
        grid: height and width, powers of two.
    """
    rows, columns = np.indices(grid)
    (height, width), maps = grid, [np.zeros(grid, np.int32)]
    while height * width > 1:
        if height >= width:
            height //= 2
            half = rows // height % 2
        else:
            width //= 2
            half = columns // width % 2
        maps.append(2 * maps[-1] + half.astype(np.int32))
    return np.stack(maps).reshape(len(maps), -1)


def cluster_means(
    values: Float[Array, "*batch L D"], maps: Int[Array, "*batch L"], num_clusters: int
) -> Float32[Array, "*batch N D"]:
    """The mean value of each cluster; differentiable with respect to the values.

    Args:
        maps: labels in 0..num_clusters-1.
        num_clusters: N, which may exceed the number of labels in use.

    Returns:
        The means, zero for a label that no position has.
    """
    members = jax.nn.one_hot(maps, num_clusters, dtype=jnp.float32)
    sums = jnp.einsum(
        "...ln,...ld->...nd", members, values.astype(jnp.float32), precision=lax.Precision.HIGHEST
    )
    return sums / jnp.maximum(jnp.sum(members, axis=-2), 1)[..., None]


def split(
    maps: Int[Array, "*batch L"],
    scores: Float[Array, "*batch L"],
    stage: int | Int[Array, ""],
    key: PRNGKeyArray | None = None,
    kept: Int[Array, "*batch L"] | None = None,
) -> Int32[Array, "*batch L"]:
    """Splits every cluster of stage i evenly into two clusters of stage i+1.

    Within cluster j, the half of the positions with the larger scores becomes cluster 2j+1 and the
    other half cluster 2j. Ties rank the lower position index higher; NaN counts as -inf. The split
    is exactly even for any scores.

    With a key, the half is sampled without replacement (Gumbel top-k): a position with score s has
    probability proportional to clip(s, -1, 1) + 1. Positions with probability zero come last, by
    score.

    Args:
        maps: maps of stage i with clusters of equal size.
        stage: i in 0..K-1.
        key: None, or one random key for all of `scores`. To make the split of a sample independent
            of its batch, `vmap` over samples and keys.
        kept: the child (0 or 1) that a position must take, or -1 if it is free. The free positions
            of a cluster fill the remaining places; those with the larger scores go to 2j+1. At most
            half of a cluster's positions may be assigned to one child.

    Returns:
        Maps of stage i+1.
    """
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores.astype(jnp.float32))
    first_by = scores
    if key is not None:
        first_by = jnp.log(jnp.clip(scores, -1, 1) + 1) + jax.random.gumbel(key, scores.shape)
    # A position's rank is the number of positions of its cluster that come before it. Counting
    # them pairwise takes a third as long as sorting (L = 256, CPU).
    position = jnp.arange(maps.shape[-1])
    before = position < position[:, None]
    for order in (scores, first_by):
        this, other = order[..., :, None], order[..., None, :]
        before = (other > this) | ((other == this) & before)
    together = maps[..., :, None] == maps[..., None, :]
    places = maps.shape[-1] >> (stage + 1)
    if kept is None:
        odd = jnp.sum(together & before, axis=-1) < places
    else:
        free = kept < 0
        rank = jnp.sum(together & before & free[..., None, :], axis=-1)
        taken = jnp.sum(together & (kept == 1)[..., None, :], axis=-1)
        odd = jnp.where(free, rank < places - taken, kept == 1)
    return (2 * maps + odd).astype(jnp.int32)


def check_structure(structure: Int[np.ndarray, "B stages L"]):
    """Checks maps that a user supplies.

    Args:
        structure: the maps of the first stages.

    Raises:
        UserError: a map does not split every cluster j of the previous stage evenly into 2j and
            2j+1; the message names the stage.
    """
    length = structure.shape[2]
    for stage in range(structure.shape[1]):
        size = length >> stage
        even = np.sort(structure[:, stage]) == np.arange(length) // size
        split = stage == 0 or (structure[:, stage] // 2 == structure[:, stage - 1]).all()
        if not (even.all() and split):
            raise UserError(
                f"The structure map of stage {stage} must use each label 0 .. {2**stage - 1} at "
                f"exactly {size} positions and split every cluster j of the stage before into 2j "
                "and 2j+1."
            )


def check_tokens(
    structure: Int[np.ndarray, "B stages L"],
    tokens: Int[np.ndarray, "B stages L"],
    codebook_size: int,
):
    """Checks tokens that a user supplies.

    Args:
        structure, tokens: those of the first stages; the maps are valid.

    Raises:
        UserError: ids outside the codebook, or ids that differ within a cluster.
    """
    if tokens.size and not (0 <= tokens.min() and tokens.max() < codebook_size):
        raise UserError(
            f"Token ids must be in 0 .. {codebook_size - 1}, got {tokens.min()} .. {tokens.max()}."
        )
    for stage in range(tokens.shape[1]):
        first = np.zeros((len(tokens), 2**stage), np.int64)
        np.put_along_axis(first, structure[:, stage], tokens[:, stage], axis=1)
        shared = np.take_along_axis(first, structure[:, stage], axis=1)
        if (shared != tokens[:, stage]).any():
            raise UserError(
                f"The tokens of stage {stage} differ within a cluster; all positions of a cluster "
                "must hold the same token id."
            )
