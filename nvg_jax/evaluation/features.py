"""Metrics of a network's features and predictions: pure functions, computed on the host.

Features are float (N, D) from any network.
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from nvg_jax.errors import UserError

logger = logging.getLogger("nvg_jax")
ROWS = 4096  # features converted to float64 at once
MAX_DISTANCES = 2**26  # distances in memory at once, 256 MiB
METRICS = ("fid", "sfid", "inception_score", "precision", "recall")


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and covariance of features that arrive in batches or on several processes, float64.

        moments = Moments()
        for features in batches:
            moments += Moments.of(features)

    Attributes:
        count: number of features N.
        mean: (D,).
        scatter: (D, D), the sum of (x - mean)(x - mean)^T over all features x.
    """

    count: int = 0
    mean: np.ndarray | float = 0.0
    scatter: np.ndarray | float = 0.0

    @classmethod
    def of(cls, features) -> "Moments":
        """The moments of features (N, D).

        Raises:
            UserError: features of another shape or not finite.
        """
        features, moments = _check_features(features), cls()
        for start in range(0, len(features), ROWS):
            x = features[start : start + ROWS].astype(np.float64)
            mean = x.mean(0)
            x -= mean
            moments += cls(len(x), mean, x.T @ x)
        return moments

    def __add__(self, other: "Moments") -> "Moments":
        """The moments of both sets together (Chan et al., 1979)."""
        count = self.count + other.count
        share = other.count / max(count, 1)
        shift = other.mean - self.mean
        between = np.multiply.outer(shift, shift) * (self.count * share)
        return Moments(count, self.mean + shift * share, self.scatter + other.scatter + between)

    @property
    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (D,) and unbiased covariance (D, D).

        Raises:
            UserError: fewer than two features.
        """
        if self.count < 2:
            raise UserError(f"A covariance needs at least two features, got {self.count}.")
        return np.asarray(self.mean), np.asarray(self.scatter) / (self.count - 1)


def frechet_distance(a, b) -> float:
    """Squared Frechet distance between two Gaussians, or the Gaussians fitted to features.

    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2), with means m and unbiased
    covariances S, in float64 (Heusel et al., 2017, Equation 6). Covariances may be singular. The
    distance is biased upward for small sets, and grows with chance differences in the number of
    images per class: compare only distances between sets of equal sizes and class counts.

    Args:
        a, b: each either features, float (N, D) with N at least 2, or their statistics, a tuple
            (mean (D,), covariance (D, D)) such as `Moments.statistics`.

    Raises:
        UserError: features or statistics of other shapes, of different D, or not finite.
    """
    (mean_a, covariance_a), (mean_b, covariance_b) = _statistics(a), _statistics(b)
    if mean_a.shape != mean_b.shape:
        raise UserError(
            f"Expected features with the same D, got D = {len(mean_a)} and D = {len(mean_b)}."
        )
    # The last trace is the sum of the singular values of S_a^1/2 S_b^1/2.
    overlap = np.linalg.norm(_square_root(covariance_a) @ _square_root(covariance_b), "nuc")
    means = np.square(mean_a - mean_b).sum()
    distance = means + np.trace(covariance_a) + np.trace(covariance_b) - 2 * overlap
    return max(float(distance), 0.0)  # rounding can leave a tiny negative number


def _statistics(features) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(features, tuple):
        return Moments.of(features).statistics
    mean, covariance = (np.asarray(x, np.float64) for x in features)
    if mean.ndim != 1 or covariance.shape != mean.shape * 2:
        raise UserError(
            "Expected statistics (mean, covariance) of shapes (D,) and (D, D), got "
            f"{mean.shape} and {covariance.shape}."
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError("Expected finite statistics, got NaN or infinite values.")
    return mean, covariance


def _check_features(features) -> np.ndarray:
    features = np.asarray(features)
    if features.ndim != 2 or 0 in features.shape:
        raise UserError(f"Expected features of shape (N, D), not empty, got {features.shape}.")
    if not np.isfinite(features).all():
        raise UserError("Expected finite features, got NaN or infinite values.")
    return features


def _square_root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric square root of a positive semi-definite matrix (D, D)."""
    values, vectors = np.linalg.eigh(matrix)
    rounding = values.max() * len(values) * np.finfo(np.float64).eps
    values = np.where(values > rounding, values, 0)
    return vectors * np.sqrt(values) @ vectors.T


def inception_score(probabilities, split_size: int = 5000) -> float:
    """Inception Score (Salimans et al., 2016).

    The exponential of the mean KL divergence between each prediction and the mean prediction,
    computed for each run of `split_size` images in the given order and averaged over the runs; a
    shorter last run counts like the others. Order matters: shuffle images that are sorted by class.

    Args:
        probabilities: float (N, C), class probabilities of each image.
        split_size: images per run.

    Returns:
        The score, from 1 to C.

    Raises:
        UserError: another shape, rows that are not probabilities, or a split size below 1.
    """
    probabilities = _check_features(probabilities)
    if split_size < 1:
        raise UserError(f"Expected a split size of at least 1, got {split_size}.")
    scores = []
    for start in range(0, len(probabilities), split_size):
        p = probabilities[start : start + split_size].astype(np.float64)
        if p.min() < 0 or np.abs(p.sum(1) - 1).max() > 1e-2:
            raise UserError(
                "Expected class probabilities, at least 0 and with rows that sum to 1, got values "
                f"from {p.min()} to {p.max()} and sums from {p.sum(1).min()} to {p.sum(1).max()}."
            )
        mean = p.mean(0)
        ratio = np.divide(p, mean, out=np.ones_like(p), where=p > 0)  # 0 log 0 is 0
        scores.append(np.exp((p * np.log(ratio)).sum(1).mean()))
    return float(np.mean(scores))


def precision_recall(reference, samples, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., 2019).

    Each point of a set has a ball that reaches to its k-th nearest other point of the same set.
    Precision is the share of samples inside any ball of the reference, recall the share of the
    reference inside any ball of the samples. Points on a sphere are inside.

    Distances are float32 and computed in blocks, which take 256 MiB in addition to the features.

    Args:
        reference: float (N, D), features of real images.
        samples: float (M, D), features of generated images.
        k: neighbors; less than N and M.

    Returns:
        Precision and recall, 0 to 1.

    Raises:
        UserError: features of other shapes, of different D, or not finite; too few for k.
    """
    reference, samples = _check_features(reference), _check_features(samples)
    if reference.shape[1] != samples.shape[1]:
        raise UserError(
            "Expected features with the same D, got "
            f"D = {reference.shape[1]} and D = {samples.shape[1]}."
        )
    if not 1 <= k < min(len(reference), len(samples)):
        raise UserError(
            f"Expected k from 1 to below the number of features, got k = {k} for "
            f"{len(reference)} reference features and {len(samples)} samples."
        )
    center = reference.mean(0, dtype=np.float64)  # large norms would cost precision
    reference, samples = (
        (x - center.astype(np.result_type(x, np.float32))).astype(np.float32, copy=False)
        for x in (reference, samples)
    )
    reference_radii, sample_radii = _squared_radii(reference, k), _squared_radii(samples, k)
    precise, recalled = np.zeros(len(samples), bool), np.zeros(len(reference), bool)
    for start, block in _blocks(reference, len(samples)):
        stop = start + len(block)
        distances = _squared_distances(block, samples)
        precise |= (distances <= reference_radii[start:stop, None]).any(0)
        recalled[start:stop] = (distances <= sample_radii).any(1)
    return float(precise.mean()), float(recalled.mean())


def _squared_radii(points: np.ndarray, k: int) -> np.ndarray:
    """float32 (N,): squared distance of each point to its k-th nearest other point.

    Radii are widened by the rounding error of the distances, so that ties count as inside.
    """
    nearest = np.full((k, len(points)), np.inf, np.float32)  # sorted along the first axis

    def insert(nearest, distances):
        for level in nearest:
            larger = np.maximum(level, distances)
            np.minimum(level, distances, out=level)
            distances = larger

    # Distances are symmetric, so each block serves its own points and all later ones.
    for start, block in _blocks(points, len(points)):
        stop, rows = start + len(block), np.arange(len(block))
        distances = _squared_distances(block, points[start:])
        distances[rows, rows] = np.inf
        for row in distances:
            insert(nearest[:, stop:], row[len(block) :])
        for _ in range(k):
            columns = distances.argmin(1)
            insert(nearest[:, start:stop], distances[rows, columns])
            distances[rows, columns] = np.inf
    rounding = 16 * np.finfo(np.float32).eps
    return nearest[-1] * (1 + rounding) + _squared_norms(points) * rounding


def _blocks(points: np.ndarray, others: int):
    """(start, rows of `points`) whose distances to `others` points fit in memory."""
    size = max(1, MAX_DISTANCES // others)
    for start in range(0, len(points), size):
        yield start, points[start : start + size]


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N, D) and (M, D) -> float32 (N, M); rounding can make small distances negative."""
    distances = a @ b.T
    distances *= -2
    distances += _squared_norms(a)[:, None]
    distances += _squared_norms(b)
    return distances


def _squared_norms(points: np.ndarray) -> np.ndarray:
    return np.einsum("nd,nd->n", points, points)


def class_agreement(predicted, requested) -> tuple[float, dict[int, float]]:
    """Share of images that a classifier assigns to the requested class.

    Args:
        predicted, requested: int (B,), class of each image.

    Returns:
        The share among all images, and the share within each requested class, both 0 to 1.

    Raises:
        UserError: arrays that are empty, not one-dimensional or of different lengths.
    """
    predicted, requested = np.asarray(predicted), np.asarray(requested)
    if predicted.shape != requested.shape or requested.ndim != 1 or not len(requested):
        raise UserError(
            "Expected predicted and requested classes as two lists of the same length, not empty, "
            f"got shapes {predicted.shape} and {requested.shape}."
        )
    agree = predicted == requested
    per_class = {int(c): float(agree[requested == c].mean()) for c in np.unique(requested)}
    return float(agree.mean()), per_class


# All metrics of a generative model.


class FeatureSet(NamedTuple):
    """A judge's features of a set of images.

    Attributes:
        count: number of images behind the statistics.
        pool: float32 (N, D), N at most `count`; None if only the statistics are known.
        logits: float32 (N, C), or None.
        pool_mean, pool_covariance, spatial_mean, spatial_covariance: float64 (D,), (D, D), ...
    """

    count: int
    pool: np.ndarray | None
    logits: np.ndarray | None
    pool_mean: np.ndarray
    pool_covariance: np.ndarray
    spatial_mean: np.ndarray
    spatial_covariance: np.ndarray


def generation_metrics(
    reference: FeatureSet, samples: FeatureSet, names: Sequence[str] = METRICS
) -> dict[str, float]:
    """FID, sFID, Inception Score, precision and recall, as the ADM evaluator defines them.

    The Inception Score depends on the order of the images, so samples are first shuffled with a
    fixed permutation. Distances for precision and recall are float32.

    Args:
        names: which of `METRICS`.

    Returns:
        {name: value}.

    Raises:
        UserError: too few images, or features of another network.
    """
    for kind, images in (("samples", samples), ("reference images", reference)):
        width = len(images.pool_mean)
        if images.count <= width:
            logger.warning(
                "%d %s for %d features: the covariance is rank deficient and FID is biased upward; "
                "compare only metrics of the same number of images",
                images.count,
                kind,
                width,
            )
    results, both = {}, (reference, samples)
    if "fid" in names:
        results["fid"] = frechet_distance(*((x.pool_mean, x.pool_covariance) for x in both))
    if "sfid" in names:
        spatial = ((x.spatial_mean, x.spatial_covariance) for x in both)
        results["sfid"] = frechet_distance(*spatial)
    if "inception_score" in names:
        assert samples.logits is not None  # the set keeps its features
        order = np.random.default_rng(0).permutation(len(samples.logits))
        results["inception_score"] = inception_score(jax.nn.softmax(samples.logits[order]))
    if {"precision", "recall"} & set(names):
        precision, recall = precision_recall(reference.pool, samples.pool)
        results |= {"precision": precision, "recall": recall}
    return results
