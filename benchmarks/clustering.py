"""Times the parallel greedy clustering against sequential versions that give the same maps.

python -m benchmarks.clustering --batch=32 --points=256 --channels=32
"""

import math
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import Array, lax

from nvg_jax.clustering import greedy_hierarchy

BATCH = flags.DEFINE_integer("batch", 32, "Latents per batch.", lower_bound=1)
POINTS = flags.DEFINE_integer("points", 256, "Positions per latent, a power of two.")
CHANNELS = flags.DEFINE_integer("channels", 32, "Channels per position.", lower_bound=1)
REPEATS = flags.DEFINE_integer(
    "repeats", 10, "Timed calls of each version; the fastest is reported.", lower_bound=1
)


@jax.jit
def sequential_xla(points: Array) -> Array:
    """One pair at a time: argmin over all pairs in a `fori_loop`, batched."""
    batch, length, _ = points.shape
    rows = jnp.arange(batch)
    members = jnp.broadcast_to(jnp.arange(length)[:, None], (batch, length, 1))
    centroids = points
    while centroids.shape[1] > 1:
        n = centroids.shape[1]
        squares = jnp.square(centroids[:, :, None] - centroids[:, None]).sum(axis=-1)
        distances = jnp.where(jnp.tri(n, dtype=bool), jnp.inf, jnp.sqrt(squares))

        def pair(k, state, n=n):
            distances, first, second = state
            flat = jnp.argmin(distances.reshape(batch, -1), axis=-1)
            i, j = flat // n, flat % n
            for one in (i, j):
                distances = distances.at[rows, one].set(jnp.inf).at[rows, :, one].set(jnp.inf)
            return distances, first.at[:, k].set(i), second.at[:, k].set(j)

        empty = jnp.zeros((batch, n // 2), jnp.int32)
        _, first, second = lax.fori_loop(0, n // 2, pair, (distances, empty, empty))
        first, second = first[..., None], second[..., None]
        take = jnp.take_along_axis
        centroids = (take(centroids, first, 1) + take(centroids, second, 1)) / 2
        members = jnp.concatenate([take(members, first, 1), take(members, second, 1)], axis=-1)
    finest = jnp.argsort(members[:, 0], axis=-1)
    return finest[:, None] >> jnp.arange(length.bit_length())[::-1, None]


def sequential_numpy(points: np.ndarray) -> np.ndarray:
    """One pair at a time, from all pairs sorted by distance; one latent at a time."""
    maps = []
    for centroids in points:
        length = len(centroids)
        members = [[position] for position in range(length)]
        while len(centroids) > 1:
            i, j = np.triu_indices(len(centroids), 1)
            distances = np.sqrt(np.square(centroids[i] - centroids[j]).sum(axis=-1))
            free = np.ones(len(centroids), bool)
            pairs = []
            for at in np.argsort(distances, kind="stable"):
                if free[i[at]] and free[j[at]]:
                    free[i[at]] = free[j[at]] = False
                    pairs.append((i[at], j[at]))
            centroids = np.stack([(centroids[a] + centroids[b]) / 2 for a, b in pairs])
            members = [members[a] + members[b] for a, b in pairs]
        finest = np.argsort(members[0])
        maps.append([finest >> bits for bits in reversed(range(length.bit_length()))])
    return np.array(maps)


def fastest(function: Callable[[Array], Array], points: Array) -> tuple[float, float]:
    """Seconds of the first call and of the fastest later call."""
    seconds = []
    for _ in range(1 + REPEATS.value):
        start = time.perf_counter()
        jax.block_until_ready(function(points))
        seconds.append(time.perf_counter() - start)
    return seconds[0], min(seconds[1:])


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}")
    shape = BATCH.value, POINTS.value, CHANNELS.value
    host_points = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    device = jax.devices()[0].device_kind
    print(f"{' x '.join(map(str, shape))} normal points, {math.prod(shape)} values, on {device}")
    print(f"{'':28}{'first call':>12}{'fastest':>12}{'ratio':>8}")
    expected, baseline = None, None
    for name, function, points in (
        ("nvg_jax, parallel rounds", greedy_hierarchy, jnp.asarray(host_points)),
        ("sequential loop in XLA", sequential_xla, jnp.asarray(host_points)),
        ("sequential loop in NumPy", sequential_numpy, host_points),
    ):
        labels = np.asarray(function(points[:1]))
        expected = labels if expected is None else expected
        same = "" if np.array_equal(labels, expected) else "   DIFFERENT MAPS"
        first, seconds = fastest(function, points)
        baseline = seconds if baseline is None else baseline
        ratio = seconds / baseline
        print(f"{name:28}{1e3 * first:>9.1f} ms{1e3 * seconds:>9.1f} ms{ratio:>8.1f}{same}")


if __name__ == "__main__":
    app.run(main)
