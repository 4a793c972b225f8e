"""From the points of a latent to the hierarchy of structure maps (Section 3.1 of the paper).

Bottom up, every level pairs the clusters of the level below: greedily, the pair of centroids with
the smallest Euclidean distance first. The greedy result is found in rounds instead of pair by
pair: two clusters that are each other's nearest free neighbor are a pair of the greedy result,
whatever happens elsewhere, so each round takes all such pairs at once.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from nvg_jax.granularity import all_stages, num_stages


@jax.jit
def greedy_hierarchy(points: Array) -> Array:
    """The structure maps of all stages, from one cluster to one cluster a position.

    The centroid of a cluster is the mean of its points, in float32. Ties between pairs go to the
    smaller first cluster, then to the smaller second one; the clusters of a level are numbered in
    the order in which their halves were paired, those of the finest level by position. Of the two
    halves of a cluster the one that was paired earlier (at the finest level the smaller position)
    is cluster 2j of its stage, the other 2j+1. A distance that is not finite counts as the largest
    finite one, so any input gives even maps. No gradient passes.

    Args:
      points: float (..., L, D), L a power of two.

    Returns:
      int32 (..., S, L): labels of stage i = 0..K in 0..2**i-1, each used L / 2**i times.

    Raises:
      ValueError: L is not a power of two.
    """
    *batch, length, dim = points.shape
    stages = num_stages(length)
    points = lax.stop_gradient(points).astype(jnp.float32)
    centroids = points.reshape(math.prod(batch), length, dim)

    levels = []
    for _ in range(stages - 1):
        halves = _greedy_pairs(_distances(centroids))
        first, second = (_take(centroids, half[..., None], 1) for half in halves)
        centroids = (first + second) / 2  # of equal sizes, so this is the mean of the points
        levels.append(halves)

    # The clusters of each stage in the order of their labels, from the coarsest stage down.
    order = jnp.zeros((centroids.shape[0], 1), jnp.int32)
    for halves in reversed(levels):
        children = [_take(half, order, 1) for half in halves]
        order = jnp.stack(children, axis=-1).reshape(order.shape[0], 2 * order.shape[1])
    finest = jnp.argsort(order, axis=-1)
    return all_stages(finest).astype(jnp.int32).reshape(*batch, stages, length)


_take = jnp.take_along_axis


def _distances(points: Array) -> Array:
    """Euclidean distances, (B, n, D) -> float32 (B, n, n), all finite but inf on the diagonal.

    Exactly symmetric, and equal for equal points: differences added up channel by channel. The
    rounds of `_match` rely on the symmetry.
    """

    def add_channel(total: Array, channel: Array) -> tuple[Array, None]:
        return total + jnp.square(channel[:, :, None] - channel[:, None, :]), None

    batch, n, _ = points.shape
    total = jnp.zeros((batch, n, n), jnp.float32)
    total, _ = lax.scan(add_channel, total, jnp.moveaxis(points, -1, 0), unroll=8)
    largest = jnp.finfo(jnp.float32).max
    total = jnp.where(total <= largest, total, largest)  # NaN compares false
    return jnp.sqrt(jnp.where(jnp.eye(n, dtype=bool), jnp.inf, total))


def _greedy_pairs(distances: Array) -> tuple[Array, Array]:
    """The greedy pairs, earliest first: (B, n, n) -> two int (B, n/2), smaller index first."""
    batch, n, _ = distances.shape
    partner, distance = _match(distances, jnp.ones((batch, n), bool))
    distance = jnp.where(jnp.arange(n) < partner, distance, jnp.inf)  # each pair once
    first = jnp.argsort(distance, axis=-1, stable=True)[:, : n // 2]
    return first, _take(partner, first, -1)


def _match(distances: Array, free: Array) -> tuple[Array, Array]:
    """The greedy partner of every free index, and its distance.

    Args:
      distances: float32 (B, n, n), symmetric.
      free: bool (B, n), an even number true in each row; the others take no part.

    Returns:
      int (B, n) and float32 (B, n); of no meaning where not free.
    """
    n = free.shape[-1]
    index = jnp.arange(n)

    def pair_mutual_nearest(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        # The closest pair of all, the first of its ties, is always mutual, so each round gets on.
        # Two plain minima: argmin is several times slower on a CPU.
        free, partner, distance = state
        allowed = free[:, :, None]
        smallest = jnp.min(jnp.where(allowed, distances, jnp.inf), axis=1)
        is_smallest = allowed & (distances == smallest[:, None, :])
        nearest = jnp.min(jnp.where(is_smallest, index[:, None], n - 1), axis=1)
        mutual = free & (_take(nearest, nearest, -1) == index)
        partner = jnp.where(mutual, nearest, partner)
        return free & ~mutual, partner, jnp.where(mutual, smallest, distance)

    # Most rounds serve the last few indices, so the last half is matched in a smaller matrix.
    rest = n // 2 if n > 128 else 0
    free, partner, distance = lax.while_loop(
        lambda state: jnp.any(jnp.sum(state[0], axis=-1) > rest),
        pair_mutual_nearest,
        (free, jnp.zeros(free.shape, index.dtype), jnp.zeros(free.shape, jnp.float32)),
    )
    if rest:
        row = jnp.arange(free.shape[0])[:, None]
        left = jnp.argsort(~free, axis=-1, stable=True)[:, :rest]  # the free ones first, in order
        left_distances = distances[row[..., None], left[:, :, None], left[:, None, :]]
        left_partner, left_distance = _match(left_distances, _take(free, left, -1))
        at = jnp.cumsum(free, axis=-1) - 1  # of a free index in `left`
        partner = jnp.where(free, _take(_take(left, left_partner, -1), at, -1), partner)
        distance = jnp.where(free, _take(left_distance, at, -1), distance)
    return partner, distance
