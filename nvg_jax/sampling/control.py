"""User inputs to the sampler: regions to edit, maps from drawings, noise between two seeds."""

import functools
from collections.abc import Callable

import numpy as np

from nvg_jax import granularity


def region_of_mask(mask: np.ndarray, latent_size: tuple[int, int]) -> np.ndarray:
    """The positions of the latent in which any pixel of a mask is set, row by row.

    Args:
        mask: bool (H, W), H and W multiples of the latent's height and width.

    Returns:
        bool (h * w,).

    Raises:
        ValueError: another shape or type, or a mask that covers no position or all of them.
    """
    mask = np.asarray(mask)
    height, width = latent_size
    if mask.ndim != 2 or mask.dtype != bool or mask.shape[0] % height or mask.shape[1] % width:
        raise ValueError(
            f"A mask must be bool (H, W) with multiples of {height} and {width}, got {mask.dtype} "
            f"{mask.shape}."
        )
    patches = mask.reshape(height, mask.shape[0] // height, width, mask.shape[1] // width)
    region = patches.any((1, 3)).ravel()
    if region.all() or not region.any():
        raise ValueError(
            f"The mask {'touches every patch of the image' if region.all() else 'covers nothing'}: "
            "sample without a mask, or mark the part that is to change."
        )
    return region


# Maps from drawings.


def structure_of_drawing(
    drawing: np.ndarray, latent_size: tuple[int, int]
) -> tuple[np.ndarray, int]:
    """The structure maps determined by a drawing of regions.

    The positions are halved repeatedly. Each time, the regions are divided between the two children
    so that the halves are as equal as possible; then the excess of the larger half moves to the
    other, nearest positions first. A drawing of two equal regions is exactly the first map.

    Args:
        drawing: int (H, W), the region of every pixel; a position belongs to the region of most of
            its pixels.

    Returns:
        The maps of all stages, int32 (S, L), and how many of them the drawing determines, counting
        stage 0: one for every doubling that the number of regions needs. Pass them to
        `Pipeline.sample` as the prefix's structure and structure_stages.

    Raises:
        ValueError: a drawing of another shape, or with only one region.
    """
    regions = regions_of_positions(drawing, latent_size)
    count = len(np.unique(regions))
    if count < 2:
        raise ValueError(
            f"On the {latent_size[0]} x {latent_size[1]} positions of the latent the drawing has "
            "one region only; draw at least two, each as large as a few positions."
        )
    rows, columns = np.divmod(np.arange(len(regions)), latent_size[1])
    places = np.stack([rows, columns], -1).astype(np.float64)
    finest = np.zeros(len(regions), np.int32)

    def halve(positions: np.ndarray, label: int):
        if len(positions) == 1:
            finest[positions] = label
            return
        first = half_of(positions, regions[positions], places[positions])
        halve(positions[first], 2 * label)
        halve(positions[~first], 2 * label + 1)

    halve(np.arange(len(regions)), 0)
    stages = min(granularity.num_stages(len(regions)), 1 + int(np.ceil(np.log2(count))))
    return np.asarray(granularity.all_stages(finest)), stages


def regions_of_positions(drawing: np.ndarray, latent_size: tuple[int, int]) -> np.ndarray:
    """int (h * w,): for each position of the latent, the most common value among its pixels."""
    drawing = np.asarray(drawing)
    (height, width), shape = latent_size, drawing.shape
    if drawing.ndim != 2 or drawing.dtype.kind not in "iu" or shape[0] % height or shape[1] % width:
        raise ValueError(
            f"A drawing must be integers (H, W) with multiples of {height} and {width}, got "
            f"{drawing.dtype} {shape}."
        )
    names, numbers = np.unique(drawing, return_inverse=True)
    patches = numbers.reshape(height, shape[0] // height, width, shape[1] // width)
    votes = (patches[..., None] == np.arange(len(names))).sum((1, 3))
    return votes.argmax(-1).ravel()


def half_of(positions: np.ndarray, regions: np.ndarray, places: np.ndarray) -> np.ndarray:
    """bool (n,): True for the positions that form the first half."""
    size = len(positions) // 2
    names, counts = np.unique(regions, return_counts=True)
    if len(names) == 1:  # not decided by the drawing: halves along the longer axis
        axis = np.ptp(places, axis=0).argmax()
        order = np.lexsort((places[:, 1 - axis], places[:, axis]))
        first = np.zeros(len(positions), bool)
        first[order[:size]] = True
        return first
    chosen = np.isin(regions, names[closest_to_half(counts)])
    if not chosen[np.argmin(regions)]:  # the region with the smallest number comes first
        chosen = ~chosen
    smaller = chosen if chosen.sum() <= size else ~chosen
    # Fill up the smaller side with the nearest positions of the larger one.
    distance = np.square(places[:, None] - places[smaller]).sum(-1).min(1)
    middle = np.square(places - places[smaller].mean(0)).sum(-1)
    order = np.lexsort((middle, distance, ~smaller))
    filled = np.zeros(len(positions), bool)
    filled[order[:size]] = True
    return filled if smaller is chosen else ~filled


def closest_to_half(counts: np.ndarray) -> np.ndarray:
    """Indices of a non-empty proper subset of counts whose sum is closest to half of the total."""
    sums = {0: ()}  # sum -> one subset
    for index, count in enumerate(counts):
        sums |= {s + count: (*chosen, index) for s, chosen in sums.items() if s + count not in sums}
    proper = {s: chosen for s, chosen in sums.items() if 0 < s < counts.sum()}
    return np.array(proper[min(proper, key=lambda s: abs(2 * s - counts.sum()))])


def circle(center: float, size: int) -> np.ndarray:
    """Bool (size, size): a disc of half the area, horizontally at `center`: 0 left .. 1 right."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    radius = np.sqrt(0.5 / np.pi)
    return np.square(x - radius - center * (1 - 2 * radius)) + np.square(y - 0.5) <= radius**2


def rings(size: int) -> np.ndarray:
    """Int (size, size): four rings of equal area around the center."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    order = np.argsort(np.argsort((x * x + y * y).ravel(), kind="stable"))
    return (4 * order // order.size).reshape(size, size)


def rectangle(size: int) -> np.ndarray:
    """Bool (size, size): a centered square of half the area."""
    far = np.abs(np.mgrid[:size, :size] - (size - 1) / 2).max(0)
    return far <= size * np.sqrt(0.5) / 2


DRAWINGS: dict[str, Callable[[int], np.ndarray]] = {
    "circle_left": functools.partial(circle, 0.0),
    "circle_center": functools.partial(circle, 0.5),
    "circle_right": functools.partial(circle, 1.0),
    "rectangle": rectangle,
    "left_right": lambda size: np.mgrid[:size, :size][1] >= size // 2,
    "top_bottom": lambda size: np.mgrid[:size, :size][0] >= size // 2,
    "rings": rings,
}


def ready_made(name: str, size: int = 256) -> np.ndarray:
    """A drawing by its name in `DRAWINGS`, int (size, size).

    Raises:
        ValueError: there is no such drawing.
    """
    if name not in DRAWINGS:
        raise ValueError(f"Unknown drawing {name!r}; choose one of {', '.join(DRAWINGS)}.")
    return DRAWINGS[name](size).astype(np.int32)


# Pixels and noise.


def paste(original: np.ndarray, edited: np.ndarray, mask: np.ndarray, feather: int) -> np.ndarray:
    """The edited image inside a mask, the original outside, blended over `feather` pixels.

    Args:
        original, edited: float (..., H, W, 3).
        mask: bool (H, W). All pixels in it come from the edited image.
    """
    weight = np.asarray(mask, np.float32)
    grown = np.asarray(mask, bool)
    for step in range(1, feather + 1):
        padded = np.pad(grown, 1)
        grown = grown | padded[2:, 1:-1] | padded[:-2, 1:-1] | padded[1:-1, 2:] | padded[1:-1, :-2]
        weight = np.maximum(weight, np.where(grown, 1 - step / (feather + 1), 0))
    weight = weight[..., None]
    return (weight * edited + (1 - weight) * original).astype(np.float32)


def between(start: np.ndarray, end: np.ndarray, share: float) -> np.ndarray:
    """Spherical interpolation of two noise arrays of the same shape: `start` at 0, `end` at 1.

    Unlike a weighted mean, it keeps the norm that the sampler expects.
    """
    lengths = np.linalg.norm(start), np.linalg.norm(end)
    angle = np.arccos(np.clip(np.vdot(start, end) / (lengths[0] * lengths[1]), -1, 1))
    if np.sin(angle) < 1e-6:
        return (1 - share) * start + share * end
    weights = np.sin((1 - share) * angle), np.sin(share * angle)
    return (weights[0] * start + weights[1] * end) / np.sin(angle)
