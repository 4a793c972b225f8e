"""The hierarchy of structure maps against a slow sequential greedy procedure."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import is_even_hierarchy
from hypothesis import given, settings
from hypothesis import strategies as st

from nvg_jax.clustering import greedy_hierarchy
from nvg_jax.errors import UserError


def sequential(points: np.ndarray) -> np.ndarray:
    """The definition, one pair at a time: (L, D) -> (S, L)."""
    length = len(points)
    clusters = [[position] for position in range(length)]
    while len(clusters) > 1:
        n = len(clusters)
        centroids = np.stack([points[cluster].astype(np.float64).mean(0) for cluster in clusters])
        distances = np.linalg.norm(centroids[:, None] - centroids[None], axis=-1)
        distances[np.tril_indices(n)] = np.inf
        merged = []
        for _ in range(n // 2):
            i, j = divmod(int(np.argmin(distances)), n)
            merged.append(clusters[i] + clusters[j])
            distances[[i, j]] = distances[:, [i, j]] = np.inf
        clusters = merged
    maps = np.empty((length.bit_length(), length), int)
    for stage in range(length.bit_length()):
        maps[stage, clusters[0]] = np.repeat(np.arange(2**stage), length >> stage)
    return maps


def assert_sequential(points: np.ndarray) -> None:
    labels = np.asarray(greedy_hierarchy(jnp.asarray(points)))
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, np.stack([sequential(one) for one in points]))


def test_drawn_4x4_map():
    # The rows and columns of the grid pair by gaps of 1 (row 1, left), 2 (row 0, left), 3, 4, 5,
    # 6, 7 and 8; then the quadrants form in the order 10.5, 20.5, 40.5 and 80.5 of the distances
    # of their halves: top left, top right, bottom right, bottom left; then the top before the
    # bottom half.
    grid = [
        [10, 12, 120, 124],
        [0, 1, 100, 103],
        [1280, 1288, 1040, 1046],
        [1200, 1207, 1000, 1005],
    ]
    maps = [
        [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
        [[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]],
        [[0, 0, 1, 1], [0, 0, 1, 1], [3, 3, 2, 2], [3, 3, 2, 2]],
        [[1, 1, 3, 3], [0, 0, 2, 2], [7, 7, 5, 5], [6, 6, 4, 4]],
        [[2, 3, 6, 7], [0, 1, 4, 5], [14, 15, 10, 11], [12, 13, 8, 9]],
    ]
    labels = greedy_hierarchy(jnp.array(grid, jnp.float32).reshape(16, 1))
    np.testing.assert_array_equal(labels.reshape(5, 4, 4), maps)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    length=st.sampled_from([2, 4, 16, 32, 64]),
    values=st.integers(1, 8),
    seed=st.integers(0, 2**32 - 1),
)
def test_ties_on_small_integers_go_to_the_smaller_index(length, values, seed):
    # Small integers: every distance and centroid is exact, most distances are tied, and with one
    # value all of them are.
    points = np.random.default_rng(seed).integers(0, values, (4, length, 2))
    assert_sequential(points.astype(np.float32))


@pytest.mark.slow
def test_real_points_of_256_positions():
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(256, 8))
    clumpy = normal + 6 * rng.normal(size=(5, 8))[rng.integers(0, 5, 256)]
    duplicates = rng.normal(size=(40, 8))[rng.integers(0, 40, 256)]
    lattice = np.stack(np.meshgrid(*[np.arange(2)] * 8), -1).reshape(256, 8)
    equal = np.ones((256, 8))
    points = np.stack([normal, clumpy, duplicates, lattice, equal]).astype(np.float32)
    # Duplicates are equally far from others only where all distances are rounded alike: by the
    # vector instructions of the default compilation, not of the tests' unoptimized one.
    default = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    labels = greedy_hierarchy.lower(points).compile(compiler_options=default)(points)
    np.testing.assert_array_equal(labels, np.stack([sequential(one) for one in points]))


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_any_input_gives_even_maps(bad):
    rng = np.random.default_rng(0)
    points = rng.normal(size=(5, 256, 8)).astype(np.float32)
    points[1, 7] = bad
    points[2, ::3, 0] = bad
    points[3] = bad
    points[4, ::2] = -bad
    labels = greedy_hierarchy(jnp.asarray(points))
    assert is_even_hierarchy(labels).all()
    np.testing.assert_array_equal(labels[0], sequential(points[0]))


@pytest.mark.slow
def test_leading_axes_and_vmap_change_nothing():
    points = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8, 4)), jnp.float32)
    labels = greedy_hierarchy(points)
    assert labels.shape == (2, 3, 4, 8)
    for i in range(2):
        for j in range(3):
            np.testing.assert_array_equal(labels[i, j], greedy_hierarchy(points[i, j]))
    np.testing.assert_array_equal(jax.vmap(jax.vmap(greedy_hierarchy))(points), labels)
    assert greedy_hierarchy(points[:0]).shape == (0, 3, 4, 8)


def test_computes_in_float32():
    # The distances 257 and 256.5 are equal in bfloat16, then the first pair would come first.
    points = jnp.array([[0, -1], [0, 256], [4096, -0.5], [4096, 256]], jnp.bfloat16)
    labels = greedy_hierarchy(points)
    np.testing.assert_array_equal(labels, [[0, 0, 0, 0], [1, 1, 0, 0], [2, 3, 0, 1]])


def test_passes_no_gradient():
    def weighted(points):
        return jnp.sum(points * greedy_hierarchy(points)[-1][:, None])

    gradient = jax.grad(weighted)(jnp.array([[7.0], [0.0], [1.0], [9.0]]))
    np.testing.assert_array_equal(gradient, [[2], [0], [1], [3]])


@pytest.mark.parametrize("length", [0, 1, 12, 255])
def test_length_must_be_a_power_of_two(length):
    with pytest.raises(UserError, match=f"{length} positions.*power of two"):
        greedy_hierarchy(jnp.zeros((2, length, 4)))
