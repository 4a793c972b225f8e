"""Metrics against independent implementations: SciPy, scikit-image, loops over pairs."""

import jax
import numpy as np
import pytest
import scipy.linalg
import skimage.metrics
from helpers import python

from nvg_jax import evaluation
from nvg_jax.errors import UserError
from nvg_jax.evaluation import Moments
from nvg_jax.evaluation import features as feature_metrics


def features(count, width, seed=0, offset=0.0):
    """Correlated features, as ReLU networks give them: not negative, many zeros."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(width, width)) / width**0.5
    return (np.maximum(rng.normal(size=(count, width)) @ mixing, 0) + offset).astype(np.float32)


# Frechet distance.


def frechet_by_scipy(a, b):
    """By the square roots of the eigenvalues of the product of the covariances."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values = scipy.linalg.eigvals(covariance_a @ covariance_b).real
    roots = np.sqrt(np.maximum(values, 0)).sum()  # rounding leaves negative ones
    traces = np.trace(covariance_a) + np.trace(covariance_b) - 2 * roots
    return np.square(a.mean(0) - b.mean(0)).sum() + traces


def test_frechet_distance_agrees_with_scipy():
    a, b = features(400, 64), features(300, 64, seed=1, offset=0.1)
    expected = frechet_by_scipy(a, b)
    assert evaluation.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count_a, count_b", [(20, 30), (20, 300), (2, 2)])
def test_frechet_distance_of_singular_covariances_agrees_with_scipy(count_a, count_b):
    a, b = features(count_a, 64), features(count_b, 64, seed=1)
    expected = frechet_by_scipy(a, b)
    assert evaluation.frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_in_the_span_of_few_features():
    """Singular covariances without roots of rounding errors: in a basis of the span of the data.

    Two sets of 10 points span at most 20 of 500 dimensions. In coordinates of this span the
    distance is the same, and regularized by nothing.
    """
    a, b = features(10, 500), features(10, 500, seed=1)
    basis = np.linalg.qr(np.concatenate([a, b]).T.astype(np.float64))[0]
    inside = evaluation.frechet_distance(a @ basis, b @ basis)
    assert evaluation.frechet_distance(a, b) == pytest.approx(inside, rel=1e-9)


def test_frechet_distance_from_statistics():
    a, b = features(200, 16), features(100, 16, seed=1)
    statistics = b.mean(0, dtype=np.float64), np.cov(b.astype(np.float64), rowvar=False)
    expected = evaluation.frechet_distance(a, b)
    assert evaluation.frechet_distance(a, statistics) == pytest.approx(expected, rel=1e-10)
    assert evaluation.frechet_distance(statistics, a) == pytest.approx(expected, rel=1e-10)
    assert evaluation.frechet_distance(statistics, statistics) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    "statistics, message",
    [
        ((np.zeros(3), np.zeros((3, 4))), r"\(D,\) and \(D, D\)"),
        ((np.zeros((3, 3)), np.zeros((3, 3))), r"\(D,\) and \(D, D\)"),
        ((np.zeros(3), np.full((3, 3), np.nan)), "finite"),
        ((np.zeros(4), np.zeros((4, 4))), "same D, got D = 3 and D = 4"),
    ],
)
def test_statistics_that_do_not_fit(statistics, message):
    with pytest.raises(UserError, match=message):
        evaluation.frechet_distance(np.eye(3), statistics)


# Moments.


@pytest.mark.parametrize("offset", [0, 1e4])
def test_moments_of_batches_and_processes(offset, monkeypatch):
    monkeypatch.setattr(feature_metrics, "ROWS", 7)
    x = features(100, 6).astype(np.float64) + offset
    first, second = Moments(), Moments()
    for start, stop in ((0, 1), (1, 33), (33, 40)):
        first += Moments.of(x[start:stop])
    second += Moments.of(x[40:].astype(np.float32).astype(np.float64))
    for moments in (first + second, second + first, first + Moments() + second):
        mean, covariance = moments.statistics
        assert moments.count == 100 and mean.dtype == covariance.dtype == np.float64
        # float32 rounds values near 1e4 to a thousandth.
        rtol = 1e-10 if not offset else 1e-2
        np.testing.assert_allclose(mean, x.mean(0), rtol=1e-6)
        np.testing.assert_allclose(covariance, np.cov(x, rowvar=False), rtol=rtol, atol=1e-3)


def test_moments_survive_a_large_mean():
    """Sums of squares would lose all digits: 1e8 squared is 1e16."""
    x = np.array([[1e8 - 1], [1e8], [1e8 + 1]])
    moments = sum((Moments.of(row[None]) for row in x), Moments())
    np.testing.assert_allclose(moments.statistics[1], [[1.0]], rtol=1e-6)


def test_moments_of_too_few():
    with pytest.raises(UserError, match="at least two features, got 1"):
        _ = Moments.of(np.zeros((1, 3))).statistics


# Inception Score.


def inception_score_by_loops(probabilities, split_size):
    scores = []
    for start in range(0, len(probabilities), split_size):
        split = [[float(p) for p in row] for row in probabilities[start : start + split_size]]
        mean = [sum(column) / len(split) for column in zip(*split)]
        divergences = [sum(p * np.log(p / m) for p, m in zip(row, mean) if p > 0) for row in split]
        scores.append(np.exp(sum(divergences) / len(split)))
    return sum(scores) / len(scores)


@pytest.mark.parametrize("split_size", [10, 30, 64, 5000])
def test_inception_score_agrees_with_loops(split_size):
    probabilities = np.random.default_rng(0).dirichlet(np.full(12, 0.3), 64).astype(np.float32)
    probabilities[5] = np.eye(12)[3]
    expected = inception_score_by_loops(probabilities, split_size)
    found = evaluation.inception_score(probabilities, split_size)
    assert found == pytest.approx(expected, rel=1e-6)


def test_inception_score_by_hand():
    # One image of each of four classes, all certain: 4. All alike: 1. Sorted, in splits of two: 1.
    certain = np.eye(4)
    assert evaluation.inception_score(certain) == pytest.approx(4)
    assert evaluation.inception_score(np.full((9, 4), 0.25)) == pytest.approx(1)
    in_order = np.repeat(certain, 2, axis=0)
    assert evaluation.inception_score(in_order, 2) == pytest.approx(1)
    assert evaluation.inception_score(in_order[[0, 2, 1, 3, 4, 6, 5, 7]], 2) == pytest.approx(2)


@pytest.mark.parametrize(
    "probabilities, message",
    [
        (np.array([[3.0, -1.0]]), "at least 0"),
        (np.array([[3.0, 1.0]]), "sum to 1"),
        (np.array([[np.nan, 1.0]]), "finite"),
        (np.ones(4), r"\(N, D\)"),
    ],
)
def test_arrays_that_are_no_probabilities(probabilities, message):
    with pytest.raises(UserError, match=message):
        evaluation.inception_score(probabilities)
    with pytest.raises(UserError, match="at least 1, got 0"):
        evaluation.inception_score(np.eye(2), 0)


# Precision and recall.


def precision_recall_by_loops(reference, samples, k):
    distance = lambda a, b: float(np.square(a.astype(np.float64) - b).sum())

    def radii(points):
        others = lambda i: sorted(distance(points[i], x) for j, x in enumerate(points) if j != i)
        return [others(i)[k - 1] for i in range(len(points))]

    def share(inside, centers):
        balls = list(zip(centers, radii(centers)))
        return np.mean([any(distance(x, c) <= r for c, r in balls) for x in inside])

    return share(samples, reference), share(reference, samples)


@pytest.mark.parametrize("block", [1, 1000, 2**26])  # of one row, several rows, everything
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_precision_recall_agrees_with_loops(block, k, offset, monkeypatch):
    monkeypatch.setattr(feature_metrics, "MAX_DISTANCES", block)
    reference = features(80, 6, offset=offset)
    samples = 0.8 * features(50, 6, seed=1) + np.float32(offset + 0.1)
    expected = precision_recall_by_loops(reference, samples, k)
    assert 0.1 < expected[0] < 0.95 and 0.1 < expected[1] < 0.95
    found = evaluation.precision_recall(reference, samples, k)
    assert found == pytest.approx(expected, abs=1e-12)


def test_precision_recall_with_ties_and_copies():
    """On a coarse grid many distances are equal, and many points are copies of others."""
    rng = np.random.default_rng(0)
    reference, samples = rng.integers(0, 3, (60, 4)), rng.integers(1, 4, (40, 4))
    expected = precision_recall_by_loops(reference, samples, 3)
    assert evaluation.precision_recall(reference, samples) == pytest.approx(expected, abs=1e-12)


def test_precision_recall_by_hand():
    # On a line, k = 1. Balls of the reference: 0 +- 1, 1 +- 1, 3 +- 2: from -1 to 5.
    # Balls of the samples: 4.5 +- 0.5, 5 +- 0.5, 7 +- 2: they hold none of the reference.
    reference, samples = np.float32([[0], [1], [3]]), np.float32([[4.5], [5], [7]])
    assert evaluation.precision_recall(reference, samples, k=1) == pytest.approx((2 / 3, 0))
    assert evaluation.precision_recall(samples, reference, k=1) == pytest.approx((0, 2 / 3))
    assert evaluation.precision_recall(reference, reference, k=1) == (1, 1)


@pytest.mark.parametrize(
    "reference, samples, k, message",
    [
        (np.zeros((5, 3)), np.zeros((5, 4)), 3, "same D"),
        (np.zeros((5, 3)), np.zeros((3, 3)), 3, "k = 3 for 5 reference features and 3 samples"),
        (np.zeros((5, 3)), np.zeros((5, 3)), 0, "k = 0"),
        (np.full((5, 3), np.inf), np.zeros((5, 3)), 3, "finite"),
    ],
)
def test_features_without_precision_and_recall(reference, samples, k, message):
    with pytest.raises(UserError, match=message):
        evaluation.precision_recall(reference, samples, k)


# Similarity of images.


def pairs_of_images(size):
    """uint8: noise and its blur, flat and nearly flat, black and white, equal images."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
    slope = np.broadcast_to(np.linspace(0, 255, size[1])[:, None], (*size, 3)).astype(np.uint8)
    flat = np.full((*size, 3), 200, np.uint8)
    nearly = flat + rng.integers(0, 3, (*size, 3)).astype(np.uint8)
    a = np.stack([noise, slope, flat, flat, np.zeros_like(flat), slope])
    b = np.stack([noise // 2 + slope // 2, noise, nearly, flat - 7, flat + 55, slope])
    return a, b


@pytest.mark.parametrize("size", [(64, 48), (7, 7), (256, 256)])
def test_structural_similarity_agrees_with_scikit_image(size):
    a, b = pairs_of_images(size)
    expected = [
        skimage.metrics.structural_similarity(x / 255, y / 255, data_range=1, channel_axis=-1)
        for x, y in zip(a, b)
    ]
    found = evaluation.structural_similarity(a, b)
    assert found.shape == (6,) and found[-1] == 1
    np.testing.assert_allclose(found, expected, atol=2e-6)
    np.testing.assert_allclose(jax.jit(evaluation.structural_similarity)(b, a), found, atol=1e-6)


@pytest.mark.parametrize(
    "a, b, message",
    [
        (np.zeros((1, 6, 9, 3), np.uint8), np.zeros((1, 6, 9, 3), np.uint8), "at least 7 x 7"),
        (np.zeros((1, 9, 9, 3), np.uint8), np.zeros((1, 9, 8, 3), np.uint8), "same shape"),
        (np.zeros((1, 9, 9, 3)), np.zeros((1, 9, 9, 3)), "got float64"),
        (np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9, 3), np.uint8), r"\(B, H, W, 3\)"),
    ],
)
def test_images_without_structural_similarity(a, b, message):
    with pytest.raises(UserError, match=message):
        evaluation.structural_similarity(a, b)


def test_psnr_agrees_with_scikit_image():
    a, b = (images[:5] for images in pairs_of_images((64, 48)))
    expected = [
        skimage.metrics.peak_signal_noise_ratio(x / 255, y / 255, data_range=1)
        for x, y in zip(a, b)
    ]
    np.testing.assert_allclose(evaluation.psnr(a, b), expected, rtol=1e-6)


def test_importing_the_metrics_is_cheap():
    """Of the metrics alone: what the package imports before is subtracted."""
    script = (
        "import sys, nvg_jax; before = set(sys.modules); import nvg_jax.evaluation; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split()) & {"sklearn", "grain", "tensorflow", "optax"}
