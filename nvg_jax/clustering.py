"""Clusters the points of a latent into a hierarchy of structure maps (Section 3.1 of the paper).

Levels are built bottom up. Each level pairs the clusters of the level below greedily, always taking
the pair of free clusters whose centroids have the smallest Euclidean distance. Pairs are found in
parallel rounds: two clusters that are each other's nearest free neighbor form a pair of the greedy
result regardless of all other clusters, so each round takes all such pairs at once.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Float32, Int, Int32

from nvg_jax.granularity import all_stages, num_stages

take = jnp.take_along_axis


@jax.jit
def greedy_hierarchy(points: Float[Array, "*batch L D"]) -> Int32[Array, "*batch S L"]:
    """The structure maps of all stages, from a single cluster to one cluster per position.

    The centroid of a cluster is the mean of its points, in float32. Ties between pairs go to the
    smaller first cluster, then to the smaller second one. The clusters of a level are numbered in
    the order in which they were paired; at the finest level, by position. The half of cluster j
    that was paired earlier (at the finest level, the smaller position) becomes cluster 2j of the
    next stage, the other half cluster 2j+1. A distance that is not finite counts as the largest
    finite one, so every input gives even maps. Gradients are stopped.

    Returns:
        Labels of stage i = 0..K in 0..2**i-1, each used L / 2**i times.

    Raises:
        UserError: L is not a power of two, or is less than 2.
    """
    *batch, length, dim = points.shape
    stages = num_stages(length)
    points = lax.stop_gradient(points).astype(jnp.float32)
    centroids = points.reshape(math.prod(batch), length, dim)

    levels = []
    for _ in range(stages - 1):
        halves = greedy_pairs(pairwise_distances(centroids))
        first, second = (take(centroids, half[..., None], 1) for half in halves)
        centroids = (first + second) / 2  # equal sizes, so this is the mean of the points
        levels.append(halves)

    # Clusters of each stage, ordered by label; from the coarsest stage to the finest.
    order = jnp.zeros((centroids.shape[0], 1), jnp.int32)
    for halves in reversed(levels):
        children = [take(half, order, 1) for half in halves]
        order = jnp.stack(children, axis=-1).reshape(order.shape[0], 2 * order.shape[1])
    finest = jnp.argsort(order, axis=-1)
    return all_stages(finest).astype(jnp.int32).reshape(*batch, stages, length)


def pairwise_distances(points: Float[Array, "B n D"]) -> Float32[Array, "B n n"]:
    """Euclidean distances; finite, except inf on the diagonal.

    Squared differences are summed channel by channel, so the result is exactly symmetric, which
    the rounds of `match` rely on, and equal points have equal distances.
    """

    def add_channel(total: Array, channel: Array) -> tuple[Array, None]:
        return total + jnp.square(channel[:, :, None] - channel[:, None, :]), None

    batch, n, _ = points.shape
    total = jnp.zeros((batch, n, n), jnp.float32)
    total, _ = lax.scan(add_channel, total, jnp.moveaxis(points, -1, 0), unroll=8)
    largest = jnp.finfo(jnp.float32).max
    total = jnp.where(total <= largest, total, largest)  # NaN compares false
    return jnp.sqrt(jnp.where(jnp.eye(n, dtype=bool), jnp.inf, total))


def greedy_pairs(
    distances: Float[Array, "B n n"],
) -> tuple[Int[Array, "B n//2"], Int[Array, "B n//2"]]:
    """The greedy pairs, earliest first; the smaller index of each pair, and the larger one."""
    batch, n, _ = distances.shape
    partner, distance = match(distances, jnp.ones((batch, n), bool))
    distance = jnp.where(jnp.arange(n) < partner, distance, jnp.inf)  # each pair once
    first = jnp.argsort(distance, axis=-1, stable=True)[:, : n // 2]
    return first, take(partner, first, -1)


def match(
    distances: Float[Array, "B n n"], free: Bool[Array, "B n"]
) -> tuple[Int[Array, "B n"], Float[Array, "B n"]]:
    """The greedy partner of every free index, and the distance to it.

    Args:
        distances: symmetric.
        free: an even number of True values per row; other indices are ignored.

    Returns:
        (partner, distance), meaningless where not free.
    """
    n = free.shape[-1]
    index = jnp.arange(n)

    def pair_mutual_nearest(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        # The closest pair of all (the first one, if tied) is always mutual, so every round makes
        # progress. Uses two plain minima because argmin is several times slower on a CPU.
        free, partner, distance = state
        allowed = free[:, :, None]
        smallest = jnp.min(jnp.where(allowed, distances, jnp.inf), axis=1)
        is_smallest = allowed & (distances == smallest[:, None, :])
        nearest = jnp.min(jnp.where(is_smallest, index[:, None], n - 1), axis=1)
        mutual = free & (take(nearest, nearest, -1) == index)
        partner = jnp.where(mutual, nearest, partner)
        return free & ~mutual, partner, jnp.where(mutual, smallest, distance)

    # Most rounds are spent on the last few indices, so the last half uses a smaller matrix.
    rest = n // 2 if n > 128 else 0
    free, partner, distance = lax.while_loop(
        lambda state: jnp.any(jnp.sum(state[0], axis=-1) > rest),
        pair_mutual_nearest,
        (free, jnp.zeros(free.shape, index.dtype), jnp.zeros(free.shape, jnp.float32)),
    )
    if rest:
        row = jnp.arange(free.shape[0])[:, None]
        left = jnp.argsort(~free, axis=-1, stable=True)[:, :rest]  # free indices first, in order
        left_distances = distances[row[..., None], left[:, :, None], left[:, None, :]]
        left_partner, left_distance = match(left_distances, take(free, left, -1))
        at = jnp.cumsum(free, axis=-1) - 1  # where a free index stands in `left`
        partner = jnp.where(free, take(take(left, left_partner, -1), at, -1), partner)
        distance = jnp.where(free, take(left_distance, at, -1), distance)
    return partner, distance
