"""Metrics of images: their similarity in pairs, and whether samples copy the training images.

Images are float32 (B, H, W, 3) in [-1, 1] or uint8 (B, H, W, 3) in 0..255; the uint8 value v is
the float value v / 127.5 - 1.
"""

import functools
import logging
import operator

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy

from nvg_jax.errors import UserError, comes_with

with epy.lazy_imports(error_callback=comes_with("train")):  # slow
    from sklearn import metrics

logger = logging.getLogger("nvg_jax")

LOW_QUANTILE = 0.05  # distances below this quantile of held-out images are unusually small
SSIM_WINDOW = 7  # pixels of the square window


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
            shifted = (
                jax.lax.slice_in_dim(values, start, start + size, axis=axis)
                for start in range(SSIM_WINDOW)
            )
            values = functools.reduce(operator.add, shifted)
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


def _check_same_shape(images_a, images_b):
    if images_a.shape != images_b.shape:
        raise UserError(
            f"Expected two batches of the same shape, got {images_a.shape} and {images_b.shape}."
        )


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

    queries, references = to_float(queries), to_float(references)
    if queries.shape[1:] != references.shape[1:]:
        raise UserError(
            f"Cannot compare images of size {queries.shape[1:3]} with images of size "
            f"{references.shape[1:3]}; resize all to one size."
        )
    queries, references = queries.reshape(len(queries), -1), references.reshape(len(references), -1)
    nearest = metrics.pairwise_distances_argmin(queries, references)  # in chunks
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
    shifted or recolored ones. Held-out images that are training images, too, are left out.

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
        UserError: images of different sizes, arrays that are not images, or nothing is held out.
    """
    sampled, real = nearest_distances(samples, train), nearest_distances(held_out, train)
    copies = int((real == 0).sum())
    if copies:
        logger.warning(
            "%d of %d held-out images are also training images: remove them. Copies among the "
            "samples are judged by the others.",
            copies,
            len(real),
        )
        if copies == len(real):
            raise UserError("All held-out images are also training images; hold out others.")
        real = real[real > 0]
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
