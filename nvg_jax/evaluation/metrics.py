"""Metrics of images and of image features: pure functions that know no model.

Images are float32 (B, H, W, 3) in [-1, 1] or uint8 (B, H, W, 3) in 0..255; the uint8 value v is
the float value v / 127.5 - 1. Features are float (N, D) from any network, computed on the host.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from nvg_jax.errors import UserError

LOW_QUANTILE = 0.05  # of held-out distances; smaller distances are unusually small
SSIM_WINDOW = 7  # pixels of the square window
ROWS = 4096  # features converted to float64 at once
MAX_DISTANCES = 2**26  # distances in memory at once, 256 MiB


def to_float(images, slack: float = 0.0) -> np.ndarray:
    """Converts images of either kind to float32 (B, H, W, 3) in [-1, 1].

    Args:
        slack: how far float values may lie outside, after a resize for example.

    Raises:
        UserError: another shape or dtype, an empty array, or values outside [-1, 1] or not finite.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise UserError(f"Expected images of shape (B, H, W, 3), not empty, got {images.shape}.")
    if images.dtype == np.uint8:
        return images.astype(np.float32) / 127.5 - 1
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(f"Expected images in uint8, or float in [-1, 1], got {images.dtype}.")
    images = images.astype(np.float32, copy=False)
    low, high = images.min(), images.max()
    if not (low >= -1 - slack and high <= 1 + slack):  # also true for NaN
        raise UserError(
            f"Expected float images in [-1, 1], got values from {low} to {high}. Clip a decoder's "
            "output; rescale images in another range."
        )
    return images


def psnr(images, reconstructions) -> np.ndarray:
    """Peak signal-to-noise ratio of each image in dB: 10 log10(2^2 / mean squared error).

    Args:
        images, reconstructions: images of the same shape (B, H, W, 3), each of either kind.

    Returns:
        float64 (B,), infinite where an image and its reconstruction are equal. A data set's PSNR is
        the mean over its images.

    Raises:
        UserError: different shapes, or arrays that are not images.
    """
    images, reconstructions = to_float(images), to_float(reconstructions)
    _check_same_shape(images, reconstructions)
    error = np.square(images - reconstructions).mean((1, 2, 3), dtype=np.float64)
    with np.errstate(divide="ignore"):
        return 10 * np.log10(4 / error)


def structural_similarity(images_a, images_b) -> jax.Array:
    """Structural similarity (SSIM) of each pair of images, as scikit-image computes it by default.

    7 x 7 uniform windows that lie inside the image, unbiased covariances, K1 = 0.01, K2 = 0.03,
    data range 1 for uint8 / 255, mean over windows and channels. Works inside `jax.jit`.

    Args:
        images_a, images_b: uint8 (B, H, W, 3), H and W at least 7.

    Returns:
        float32 (B,), 1 for equal images. A data set's SSIM is the mean over its images.

    Raises:
        UserError: different shapes, other dtypes, or images that are too small.
    """
    for images in (images_a, images_b):
        if (
            images.dtype != np.uint8
            or images.ndim != 4
            or images.shape[-1] != 3
            or min(images.shape[1:3]) < SSIM_WINDOW
        ):
            raise UserError(
                f"Expected uint8 images (B, H, W, 3) of at least {SSIM_WINDOW} x {SSIM_WINDOW} "
                f"pixels, got {images.dtype} {images.shape}."
            )
    _check_same_shape(images_a, images_b)
    return _structural_similarity(images_a, images_b)


@jax.jit
def _structural_similarity(x, y):
    def window_sum(values):
        for axis in (1, 2):
            size = values.shape[axis] - SSIM_WINDOW + 1
            values = sum(
                jax.lax.slice_in_dim(values, start, start + size, axis=axis)
                for start in range(SSIM_WINDOW)
            )
        return values

    # Moments are exact: at most (49 * 255)^2 < 2^31. In float32 their differences would cancel.
    x, y, n = x.astype(jnp.int32), y.astype(jnp.int32), SSIM_WINDOW**2
    sum_x, sum_y = window_sum(x), window_sum(y)
    variances = n * window_sum(x * x + y * y) - sum_x**2 - sum_y**2
    covariance = n * window_sum(x * y) - sum_x * sum_y
    mean_x, mean_y = sum_x / n, sum_y / n
    unbiased = n * (n - 1)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance / unbiased + c2)
    similarity /= (mean_x**2 + mean_y**2 + c1) * (variances / unbiased + c2)
    return similarity.mean((1, 2, 3))


def codebook_usage(counts) -> dict[str, np.ndarray]:
    """The share of the codebook in use, per stage and over all stages, from counts (S, V)."""
    used = np.asarray(counts) > 0
    return {"codebook_usage_stage": used.mean(1), "codebook_usage": used.any(0).mean()}


def _check_same_shape(images_a, images_b):
    if images_a.shape != images_b.shape:
        raise UserError(
            f"Expected two batches of the same shape, got {images_a.shape} and {images_b.shape}."
        )


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
        return self.mean, self.scatter / (self.count - 1)


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


def nearest_distances(queries, references) -> np.ndarray:
    """Distance of each query image to its nearest reference image.

    The distance is Euclidean over all values in [-1, 1], divided by sqrt(H * W * 3): a root mean
    square error, from 0 (a copy) to 2 (black versus white).

    Args:
        queries: images (B, H, W, 3).
        references: images (N, H, W, 3).

    Returns:
        float64 (B,).

    Raises:
        UserError: images of different sizes, or arrays that are not images.
    """
    from sklearn.metrics import pairwise_distances_argmin  # takes seconds to import

    queries, references = to_float(queries), to_float(references)
    if queries.shape[1:] != references.shape[1:]:
        raise UserError(
            f"Cannot compare images of size {queries.shape[1:3]} with images of size "
            f"{references.shape[1:3]}; resize all to one size."
        )
    queries, references = queries.reshape(len(queries), -1), references.reshape(len(references), -1)
    nearest = pairwise_distances_argmin(queries, references)  # in chunks
    return np.sqrt(np.square(queries - references[nearest]).mean(1, dtype=np.float64))


def copying_report(samples, train, held_out) -> dict[str, float | bool]:
    """Whether samples lie closer to the training images than unseen real images do.

    The distance of each sample and each held-out image to its nearest training image is computed
    by `nearest_distances`. Samples are not closer (`not_nearer`) when both hold:
      - the median over the samples is at least the median over the held-out images (samples are
        not closer on the whole), and
      - at most 5% of the samples fall below the 5% quantile of the held-out distances (no part of
        the samples is copied).
    Neither comparison leaves a margin for chance. With unseen real images in place of samples, the
    share would scatter around 5% by `near_share_error`. The distance detects pixel copies, but not
    shifted or recolored ones.

    Args:
        samples, train, held_out: images (B, H, W, 3) of one size, preprocessed identically, without
            random augmentation; B may differ. `held_out` was not trained on.

    Returns:
        samples_median, samples_mean, held_out_median, held_out_mean: distances.
        held_out_low_quantile: the distance that 5% of the held-out images fall below.
        near_share: the share of samples below that distance, 0 to 1.
        near_share_error: the standard error of this share for real images.
        not_nearer: the verdict.

    Raises:
        UserError: images of different sizes, or arrays that are not images.
    """
    sampled, real = nearest_distances(samples, train), nearest_distances(held_out, train)
    low = np.quantile(real, LOW_QUANTILE)
    near_share = (sampled < low).mean()
    variance = LOW_QUANTILE * (1 - LOW_QUANTILE) * (1 / len(sampled) + 1 / len(real))
    return {
        "samples_median": float(np.median(sampled)),
        "samples_mean": float(sampled.mean()),
        "held_out_median": float(np.median(real)),
        "held_out_mean": float(real.mean()),
        "held_out_low_quantile": float(low),
        "near_share": float(near_share),
        "near_share_error": float(np.sqrt(variance)),
        "not_nearer": bool(np.median(sampled) >= np.median(real) and near_share <= LOW_QUANTILE),
    }


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
