"""Measures of image quality: pure functions from arrays to float64 numbers, on the host.

Images are float32 (B, H, W, 3) in [-1, 1] or uint8 (B, H, W, 3) in 0..255, which is the same
picture as value / 127.5 - 1.
"""

import jax.numpy as jnp
import numpy as np

LOW_QUANTILE = 0.05  # of held-out distances: nearer than this is unusually near


def to_float(images) -> np.ndarray:
    """Images of either kind as float32 (B, H, W, 3) in [-1, 1].

    Raises:
        ValueError: another shape or type, no images, or values outside [-1, 1] or not finite.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(
            f"Images must have the shape (B, H, W, 3), none of it 0, not {images.shape}."
        )
    if images.dtype == np.uint8:
        return images.astype(np.float32) / 127.5 - 1
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"Images must be uint8, or float in [-1, 1], not {images.dtype}.")
    images = images.astype(np.float32, copy=False)
    low, high = images.min(), images.max()
    if not (low >= -1 and high <= 1):  # also where either is NaN
        raise ValueError(
            f"Float images must be in [-1, 1], these reach from {low} to {high}; clip what a "
            "decoder gives, and scale other ranges."
        )
    return images


def psnr(images, reconstructions) -> np.ndarray:
    """Peak signal-to-noise ratio of every image in dB: 10 log10(2^2 / mean squared error).

    Args:
        images, reconstructions: images of equal shape (B, H, W, 3), each of either kind.

    Returns:
        float64 (B,), infinite where image and reconstruction are equal. The figure reported for
        a data set is the mean over its images.

    Raises:
        ValueError: unequal shapes, or arrays that are no images.
    """
    images, reconstructions = to_float(images), to_float(reconstructions)
    if images.shape != reconstructions.shape:
        raise ValueError(
            f"Images {images.shape} and reconstructions {reconstructions.shape} must have the "
            "same shape."
        )
    error = np.square(images - reconstructions).mean((1, 2, 3), dtype=np.float64)
    with np.errstate(divide="ignore"):
        return 10 * np.log10(4 / error)


def frechet_distance(features_a, features_b) -> float:
    """Squared Frechet distance of the Gaussians fitted to two sets of features.

    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2), with means m and unbiased
    covariances S, in float64 (Heusel et al., 2017, Equation 6). Singular covariances are allowed.
    The distance of small sets is too large, and chance differences in how many images each class
    has add to it: compare only distances between sets of the same sizes with the same classes.

    Args:
        features_a: float (N_a, F), N_a at least 2.
        features_b: float (N_b, F), N_b at least 2.

    Raises:
        ValueError: features of other shapes or not finite.
    """
    features_a, features_b = np.asarray(features_a, np.float64), np.asarray(features_b, np.float64)
    for features in features_a, features_b:
        if features.ndim != 2 or len(features) < 2 or features.shape[1] != features_a.shape[1]:
            raise ValueError(
                "Two sets of features must have the shapes (N, F) with the same F and at least two "
                f"rows each, not {features_a.shape} and {features_b.shape}."
            )
        if not np.isfinite(features).all():
            raise ValueError("Features must be finite; these hold NaN or infinite values.")
    covariance_a = np.atleast_2d(np.cov(features_a, rowvar=False))
    covariance_b = np.atleast_2d(np.cov(features_b, rowvar=False))
    # The last trace is the sum of the singular values of S_a^1/2 S_b^1/2.
    overlap = np.linalg.norm(_square_root(covariance_a) @ _square_root(covariance_b), "nuc")
    means = np.square(features_a.mean(0) - features_b.mean(0)).sum()
    distance = means + np.trace(covariance_a) + np.trace(covariance_b) - 2 * overlap
    return max(float(distance), 0.0)  # rounding can leave a tiny negative number


def _square_root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric root of a positive semi-definite matrix (F, F)."""
    values, vectors = np.linalg.eigh(matrix)
    rounding = values.max() * len(values) * np.finfo(np.float64).eps
    values = np.where(values > rounding, values, 0)
    return vectors * np.sqrt(values) @ vectors.T


def nearest_distances(queries, references) -> np.ndarray:
    """Distance of every query image to the reference image nearest to it.

    The distance is Euclidean over all values in [-1, 1], divided by sqrt(H * W * 3): a root mean
    square error, from 0 (a copy) to 2 (black against white).

    Args:
        queries: images (B, H, W, 3).
        references: images (N, H, W, 3).

    Returns:
        float64 (B,).

    Raises:
        ValueError: images of different sizes, or arrays that are no images.
    """
    from sklearn.metrics import pairwise_distances_argmin  # takes seconds to import

    queries, references = to_float(queries), to_float(references)
    if queries.shape[1:] != references.shape[1:]:
        raise ValueError(
            f"Images of size {queries.shape[1:3]} cannot be compared with images of size "
            f"{references.shape[1:3]}; bring all to one size."
        )
    queries, references = queries.reshape(len(queries), -1), references.reshape(len(references), -1)
    nearest = pairwise_distances_argmin(queries, references)  # in chunks
    return np.sqrt(np.square(queries - references[nearest]).mean(1, dtype=np.float64))


def copying_report(samples, train, held_out) -> dict[str, float | bool]:
    """Whether samples lie nearer to the training images than real unseen images do.

    Every sample and every held-out image gets the distance to its nearest training image
    (`nearest_distances`). The samples are "not nearer than held-out" when both hold:
      - the median over the samples is at least the median over the held-out images (they are not
        nearer on the whole), and
      - at most 5% of the samples lie nearer than the 5% quantile of the held-out images, that is,
        nearer than all but 5% of those do (no part of the samples is copied).
    Both are taken strictly, without a margin for chance. Real unseen images in the place of the
    samples would scatter by `near_share_error` around a share of 5%. The distance sees copies of
    pixels; it does not see a copy that is shifted or recolored.

    Args:
        samples, train, held_out: images (B, H, W, 3) of one size, transformed alike without
            random augmentation; B may differ. `held_out` was not trained on.

    Returns:
        samples_median, samples_mean, held_out_median, held_out_mean: distances.
        held_out_low_quantile: the distance that 5% of the held-out images fall below.
        near_share: the share of samples nearer than that, 0 to 1.
        near_share_error: the standard error that this share would have for real images.
        not_nearer: the verdict.

    Raises:
        ValueError: images of different sizes, or arrays that are no images.
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


def class_agreement(predicted, asked) -> tuple[float, dict[int, float]]:
    """Share of images that a classifier names as the class that was asked for.

    Args:
        predicted, asked: int (B,), class of every image.

    Returns:
        The share of all images, and the share of each class among `asked`, both 0 to 1.

    Raises:
        ValueError: arrays that are empty, not one-dimensional or of different lengths.
    """
    predicted, asked = np.asarray(predicted), np.asarray(asked)
    if predicted.shape != asked.shape or asked.ndim != 1 or not len(asked):
        raise ValueError(
            "Predicted and asked classes must be two lists of the same length, not empty; their "
            f"shapes are {predicted.shape} and {asked.shape}."
        )
    agree = predicted == asked
    per_class = {int(label): float(agree[asked == label].mean()) for label in np.unique(asked)}
    return float(agree.mean()), per_class
