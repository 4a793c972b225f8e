"""Structure maps: embedding, cluster means, splits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import is_even_hierarchy, labels_from_embedding
from hypothesis import given, settings
from hypothesis import strategies as st

from nvg_jax.errors import UserError
from nvg_jax.granularity import (
    cluster_means,
    grid_structure,
    num_stages,
    split,
    structure_embedding,
)


def random_hierarchy(rng: np.random.Generator, length: int) -> np.ndarray:
    stages = length.bit_length()
    return rng.permutation(length)[None] >> np.arange(stages)[::-1, None]


def test_number_of_stages():
    assert [num_stages(length) for length in (2, 4, 16, 256, 1024)] == [2, 3, 5, 9, 11]
    for length in (-4, 0, 1, 3, 12, 255):
        with pytest.raises(UserError, match=f"{length} positions.*power of two"):
            num_stages(length)


def test_embedding_of_a_drawn_map():
    # Label 5 of stage 3 is 101: the largest bit first, then one channel of padding.
    labels = jnp.array([0, 1, 5, 7])
    expected = [[0, 0, 0, 1], [0, 0, 2, 1], [2, 0, 2, 1], [2, 2, 2, 1]]
    embedding = structure_embedding(labels, 3, 4)
    assert embedding.dtype == jnp.int32
    np.testing.assert_array_equal(embedding, expected)
    np.testing.assert_array_equal(structure_embedding(jnp.zeros(4, int), 0, 4), np.ones((4, 4)))
    np.testing.assert_array_equal(structure_embedding(jnp.array([9]), 4, 4), [[2, 0, 0, 2]])


@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True)
@given(num_bits=st.sampled_from([1, 4, 8]), seed=st.integers(0, 2**32 - 1))
def test_embedding_and_labels_are_inverse(num_bits, seed):
    rng = np.random.default_rng(seed)
    maps = np.stack([random_hierarchy(rng, 2**num_bits) for _ in range(2)])
    stages = jnp.arange(num_bits + 1)
    embedding = structure_embedding(jnp.asarray(maps), stages, num_bits)
    assert embedding.shape == (2, num_bits + 1, 2**num_bits, num_bits)
    np.testing.assert_array_equal(labels_from_embedding(embedding, stages), maps)
    # A child differs from its parent in one channel only, and there from padding to a bit.
    changed = np.asarray(embedding[:, 1:] != embedding[:, :-1])
    expected = np.broadcast_to(np.eye(num_bits, dtype=bool)[:, None], changed.shape)
    np.testing.assert_array_equal(changed, expected)


def test_embedding_of_a_traced_stage_for_each_sample():
    rng = np.random.default_rng(0)
    maps = jnp.asarray(random_hierarchy(rng, 16))
    stages = jnp.array([3, 1])
    embedding = jax.jit(structure_embedding, static_argnums=2)(maps[stages], stages, 4)
    for i, stage in enumerate((3, 1)):
        np.testing.assert_array_equal(embedding[i], structure_embedding(maps[stage], stage, 4))
    np.testing.assert_array_equal(labels_from_embedding(embedding, stages), maps[stages])


def test_the_blocks_of_a_grid_are_halved():
    """Squares into an upper and a lower half, other blocks across their longer side."""
    square = [
        ["0000", "0000", "0000", "0000"],
        ["0000", "0000", "1111", "1111"],
        ["0011", "0011", "2233", "2233"],
        ["0022", "1133", "4466", "5577"],
        ["0145", "2367", "89cd", "abef"],
    ]
    wide = [["0000"] * 2, ["0011"] * 2, ["0022", "1133"], ["0145", "2367"]]
    for grid, drawn in (((4, 4), square), ((2, 4), wide)):
        expected = [[int(label, 16) for label in "".join(rows)] for rows in drawn]
        np.testing.assert_array_equal(grid_structure(grid), expected)
        assert is_even_hierarchy(grid_structure(grid)[None]).all()


def test_cluster_means_of_a_drawn_map():
    labels = jnp.array([[0, 1, 1, 0], [3, 3, 3, 0]])
    values = jnp.array([[[1, 10], [2, 20], [4, 40], [8, 80]]] * 2, jnp.bfloat16)
    means = cluster_means(values, labels, 4)
    assert means.dtype == jnp.float32
    expected = [
        [[4.5, 45], [3, 30], [0, 0], [0, 0]],
        [[8, 80], [0, 0], [0, 0], [7 / 3, 70 / 3]],
    ]
    np.testing.assert_allclose(means, expected, rtol=1e-6)


def test_cluster_means_share_the_gradient():
    labels = jnp.array([0, 1, 1, 1])
    gradient = jax.grad(lambda values: cluster_means(values, labels, 4)[1, 0])(jnp.ones((4, 2)))
    np.testing.assert_allclose(gradient, [[0, 0], [1 / 3, 0], [1 / 3, 0], [1 / 3, 0]], rtol=1e-6)


def test_split_of_a_drawn_map():
    labels = jnp.array([0, 1, 0, 1, 0, 1, 0, 1])
    scores = jnp.array([0.3, -0.5, -0.2, -0.4, 0.1, -0.7, 0.2, -0.6])
    children = split(labels, scores, 1)
    assert children.dtype == jnp.int32
    np.testing.assert_array_equal(children, [1, 3, 0, 3, 0, 2, 1, 2])


@pytest.mark.parametrize(
    "scores, odd",
    [
        ([0, 0, 0, 0], [1, 1, 0, 0]),  # the smaller position
        ([0, 1, 0, 0], [1, 1, 0, 0]),
        ([-0.0, 0.0, 1, 1], [0, 0, 1, 1]),
        ([0.0, -0.0, 0.0, -0.0], [1, 1, 0, 0]),  # the zeros are equal
        ([2, 3, 1.5, 4], [0, 1, 0, 1]),  # beyond the clip the order still counts
        ([-2, -3, -1.5, -4], [1, 0, 1, 0]),
        ([np.nan, 0, np.nan, -1], [0, 1, 0, 1]),
        ([np.nan] * 4, [1, 1, 0, 0]),
        ([np.nan, np.inf, -np.inf, -5], [0, 1, 0, 1]),
        ([-np.inf] * 4, [1, 1, 0, 0]),
        ([np.inf, np.nan, np.inf, np.inf], [1, 0, 1, 0]),
    ],
)
def test_split_of_difficult_scores(scores, odd):
    np.testing.assert_array_equal(split(jnp.zeros(4, int), jnp.array(scores, float), 0), odd)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from([1, 2, 4, 5]),
    data=st.data(),
    with_key=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_split_is_even(bits, data, with_key, seed):
    rng = np.random.default_rng(seed)
    length = 2**bits
    score = st.one_of(
        st.floats(width=32), st.sampled_from([np.nan, np.inf, -np.inf, -1.0, 1.0, 0.0])
    )
    scores = np.array(data.draw(st.lists(score, min_size=length, max_size=length)), np.float32)
    scores[np.abs(scores) < 1e-30] = 0  # XLA flushes subnormal numbers
    stage = data.draw(st.integers(0, bits - 1))
    labels = random_hierarchy(rng, length)[stage]
    key = jax.random.key(seed) if with_key else None
    children = np.asarray(jax.jit(split)(jnp.asarray(labels), jnp.asarray(scores), stage, key))
    np.testing.assert_array_equal(children // 2, labels)
    np.testing.assert_array_equal(
        np.bincount(children, minlength=2 ** (stage + 1)), length >> (stage + 1)
    )
    if not with_key:
        ordered = np.where(np.isnan(scores), -np.inf, scores)
        for cluster in range(2**stage):
            even, odd = (ordered[children == 2 * cluster + half] for half in (0, 1))
            assert odd.min() >= even.max()


def test_drawn_split_has_the_stated_probabilities():
    # Of two positions the first is the odd child with probability 1.5 / (1.5 + 0.5); of the pair
    # (5, -5) always, for the clip makes it 2 to 0.
    labels = jnp.array([0, 1, 0, 1])
    scores = jnp.array([0.5, 5.0, -0.5, -5.0])
    keys = jax.random.split(jax.random.key(0), 4000)
    children = np.asarray(jax.vmap(lambda key: split(labels, scores, 1, key))(keys))
    assert abs(np.mean(children[:, 0] == 1) - 0.75) < 0.03  # more than four deviations
    assert (children[:, 1] == 3).all()
    assert (children[:, 0] + children[:, 2] == 1).all()


def test_drawn_split_fills_up_with_the_least_unlikely():
    # Only position 2 has a probability; the best of the others joins it, whatever the noise.
    scores = jnp.array([-7.0, -2.0, 0.0, -3.0])
    for seed in range(20):
        children = split(jnp.zeros(4, int), scores, 0, jax.random.key(seed))
        np.testing.assert_array_equal(children, [0, 1, 1, 0])


@pytest.mark.slow
def test_drawn_split_of_a_sample_does_not_depend_on_its_batch():
    rng = np.random.default_rng(0)
    labels = jnp.asarray(np.stack([random_hierarchy(rng, 16)[2] for _ in range(5)]))
    scores = jnp.asarray(rng.uniform(-1, 1, (5, 16)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 5)
    together = jax.vmap(split, (0, 0, None, 0))(labels, scores, 2, keys)
    alone = [split(labels[i], scores[i], 2, keys[i]) for i in range(5)]
    np.testing.assert_array_equal(together, alone)
    assert any((split(labels[i], scores[i], 2) != alone[i]).any() for i in range(5))


def test_even_hierarchies_are_told_from_others():
    rng = np.random.default_rng(0)
    good = random_hierarchy(rng, 16)
    crossed = good.copy()
    crossed[2] = 3 - crossed[2]  # even, but no parent of stage 3
    uneven = good.copy()
    uneven[4, uneven[4] == 15] = 14
    short = jnp.asarray(good[1:])
    long = jnp.asarray(np.concatenate([good[:1], good]))
    maps = jnp.asarray(np.stack([good, crossed, uneven]))
    np.testing.assert_array_equal(is_even_hierarchy(maps), [True, False, False])
    assert not is_even_hierarchy(short)
    assert not is_even_hierarchy(long)
