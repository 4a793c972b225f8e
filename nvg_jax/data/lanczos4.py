"""OpenCV's resizing of 8-bit images with INTER_LANCZOS4, to the bit and without OpenCV.

Each result pixel is a weighted sum of 8 x 8 source pixels around its place, whatever the scale:
shrinking is not antialiased. Weights are integers, in units of 1/2048, and the sums are exact
before one rounding at the end. So rows and columns may be summed in either order, and any part of
the result can be computed alone.

OpenCV itself would add 150 MB to the installation and take longer, since it makes the whole image
where a crop is all that is needed.
"""

import functools

import numpy as np
from scipy import sparse

TAPS = 8
SCALE_BITS = 11  # a weight along one side is an integer over 2**11
# cos and sin of the angles between the first tap and each tap, times their alternating sign.
_HALF = 0.70710678118654752440
_TURNS = np.array(
    [
        (1, 0),
        (-_HALF, -_HALF),
        (0, 1),
        (_HALF, -_HALF),
        (-1, 0),
        (_HALF, _HALF),
        (0, -1),
        (-_HALF, _HALF),
    ]
)


def resize(
    image: np.ndarray, size: tuple[int, int], rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """A part of a resized image: uint8 (len(rows), len(columns), C).

    Args:
        image: uint8 (h, w, C).
        size: height and width of the whole resized image.
        rows, columns: int, the rows and columns of the resized image to compute.
    """
    channels = image.shape[2]
    # Rows first: only those that are needed, and contiguous in memory.
    places, weights = taps(image.shape[0], size[0], rows)
    used, places = np.unique(places, return_inverse=True)
    sums = _weighted(places, weights, image[used].reshape(len(used), -1))
    sums = sums.reshape(len(rows), -1, channels).transpose(1, 0, 2)
    places, weights = taps(image.shape[1], size[1], columns)
    sums = _weighted(places, weights, sums.reshape(len(sums), -1))
    sums = sums.reshape(len(columns), len(rows), channels).transpose(1, 0, 2)
    half = 1 << (2 * SCALE_BITS - 1)
    return ((sums + half) >> (2 * SCALE_BITS)).clip(0, 255).astype(np.uint8)


def _weighted(places: np.ndarray, weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sums of the rows of `values` (n, m): int32 (N, m) for places and weights (N, 8)."""
    count = len(weights)
    indices = weights.ravel(), places.ravel(), np.arange(0, TAPS * count + 1, TAPS)
    return sparse.csr_array(indices, (count, len(values))) @ values.astype(np.int32)


def taps(size: int, target: int, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The source pixels of some of `target` pixels along a side of `size`, and their weights.

    Args:
        indices: int (n,), which of the `target` pixels.

    Returns:
        Two int32 (n, 8). Places beyond an edge are the edge's; weights are in 1/2048.
    """
    scale = 1 / (target / size)  # two divisions, as OpenCV rounds
    centers = ((indices + 0.5) * scale - 0.5).astype(np.float32)
    first = np.floor(centers)
    places = first.astype(np.int32)[:, None] + np.arange(1 - TAPS // 2, 1 + TAPS // 2)
    weights = np.rint(kernel(centers - first) * np.float32(1 << SCALE_BITS)).astype(np.int32)
    return places.clip(0, size - 1).astype(np.int32), weights


def kernel(offsets: np.ndarray) -> np.ndarray:
    """Lanczos weights of the 8 taps for each offset in [0, 1) from the fourth tap.

    Args:
        offsets: float32 (n,).

    Returns:
        float32 (n, 8) with sums of 1. The order and precision of each operation are OpenCV's.
    """
    distance = (offsets[:, None] + np.float32(3)) - np.arange(TAPS, dtype=np.float32)
    angle = -distance.astype(np.float64) * np.pi * 0.25
    sine, cosine = np.sin(angle[:, :1]), np.cos(angle[:, :1])
    on_tap = np.abs(distance) < np.float32(1e-6)
    angle[on_tap] = 1
    weights = (_TURNS[:, 0] * sine + _TURNS[:, 1] * cosine) / (angle * angle)
    weights = np.where(on_tap, 1e30, weights).astype(np.float32)  # as good as alone
    total = functools.reduce(np.add, weights.T)  # from the first tap to the last, in float32
    return weights * (np.float32(1) / total)[:, None]
