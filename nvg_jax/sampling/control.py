"""User inputs to the sampler: regions to edit, maps from drawings, noise between two seeds."""

import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32

from nvg_jax import granularity
from nvg_jax.errors import UserError
from nvg_jax.sampling.settings import as_array, check_finite, check_integer, is_integer

MAX_DIVIDED = 16  # up to this many regions, all ways to divide them are compared


def region_of_mask(mask: np.ndarray, latent_size: tuple[int, int]) -> Bool[np.ndarray, " L"]:
    """The positions of the latent in which any pixel of a mask is set, row by row.

    Args:
        mask: bool (H, W), H and W multiples of the latent's height and width.

    Raises:
        UserError: another shape or type, or a mask that covers no position or all of them.
    """
    mask = as_array(mask)
    height, width = latent_size
    if mask.ndim != 2 or mask.dtype != bool or mask.shape[0] % height or mask.shape[1] % width:
        raise UserError(
            f"A mask must be bool (H, W) with multiples of {height} and {width}, got {mask.dtype} "
            f"{mask.shape}."
        )
    patches = mask.reshape(height, mask.shape[0] // height, width, mask.shape[1] // width)
    region = patches.any((1, 3)).ravel()
    if region.all() or not region.any():
        raise UserError(
            f"The mask {'touches every patch of the image' if region.all() else 'covers nothing'}: "
            "sample without a mask, or mark the part that is to change."
        )
    return region


# Maps from drawings.


def structure_of_drawing(
    drawing: np.ndarray, latent_size: tuple[int, int]
) -> tuple[Int32[np.ndarray, "S L"], int]:
    """The structure maps determined by a drawing of regions.

    The positions are halved repeatedly. Each time, the regions are divided between the two children
    so that the halves are as equal as possible and, of the equally good divisions, the border
    between them is as short as possible. Then the excess positions of the larger half move to the
    other one, beginning with those nearest to it. A drawing of two equal regions is exactly the
    first map.

    Args:
        drawing: int (H, W), the region of every pixel; a position belongs to the most common region
            among its pixels.

    Returns:
        All maps, and the number of stages that the drawing determines: stage 0, and
        one for every doubling up to the number of regions. Pass them to `Pipeline.sample` as the
        prefix's structure and structure_stages.

    Raises:
        UserError: a drawing of another shape, or with only one region.
    """
    regions = regions_of_positions(drawing, latent_size)
    count = len(np.unique(regions))
    if count < 2:
        raise UserError(
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
        first = half_of(regions[positions], places[positions])
        halve(positions[first], 2 * label)
        halve(positions[~first], 2 * label + 1)

    halve(np.arange(len(regions)), 0)
    stages = min(granularity.num_stages(len(regions)), 1 + int(np.ceil(np.log2(count))))
    return np.asarray(granularity.all_stages(finest)), stages


def regions_of_positions(
    drawing: np.ndarray, latent_size: tuple[int, int]
) -> Int[np.ndarray, " L"]:
    """For each position of the latent, the most common value among its pixels."""
    drawing = as_array(drawing)
    (height, width), shape = latent_size, drawing.shape
    if (
        drawing.ndim != 2
        or not drawing.size
        or drawing.dtype.kind not in "iu"
        or shape[0] % height
        or shape[1] % width
    ):
        raise UserError(
            f"A drawing must be integers (H, W) with multiples of {height} and {width}, got "
            f"{drawing.dtype} {shape}."
        )
    _, numbers = np.unique(drawing, return_inverse=True)
    patches = numbers.reshape(height, shape[0] // height, width, shape[1] // width)
    patches = patches.swapaxes(1, 2).reshape(height * width, -1)
    return np.array([np.bincount(patch).argmax() for patch in patches])


def half_of(
    regions: Int[np.ndarray, " n"], places: Float[np.ndarray, "n 2"]
) -> Bool[np.ndarray, " n"]:
    """True for the positions that form the first half; see `divide`."""
    size = len(regions) // 2
    if len(np.unique(regions)) == 1:  # not decided by the drawing: halves along the longer axis
        axis = np.ptp(places, axis=0).argmax()
        order = np.lexsort((places[:, 1 - axis], places[:, axis]))
        first = np.zeros(len(regions), bool)
        first[order[:size]] = True
        return first
    chosen = np.isin(regions, divide(regions, places))
    if not chosen[np.argmin(regions)]:  # the region with the smallest number comes first
        chosen = ~chosen
    smaller = chosen if chosen.sum() <= size else ~chosen
    # Fill up the smaller side with the nearest positions of the larger one.
    distance = np.square(places[:, None] - places[smaller]).sum(-1).min(1)
    middle = np.square(places - places[smaller].mean(0)).sum(-1)
    order = np.lexsort((middle, distance, ~smaller))
    filled = np.zeros(len(regions), bool)
    filled[order[:size]] = True
    return filled if smaller is chosen else ~filled


def divide(
    regions: Int[np.ndarray, " n"], places: Float[np.ndarray, "n 2"]
) -> Int[np.ndarray, " regions"]:
    """The regions that form one part when they are divided into two parts of nearly equal size.

    Of the divisions with the smallest difference in size, this takes one with the shortest border.
    With more than `MAX_DIVIDED` regions, only cuts across the longer axis are considered.

    Args:
        regions: the region of each position. places: row and column of each position.

    Returns:
        The numbers of the regions, a non-empty proper subset.
    """
    names, own, counts = np.unique(regions, return_inverse=True, return_counts=True)
    member = own[:, None] == np.arange(len(names))
    if len(names) > MAX_DIVIDED:
        centers = member.T @ places / counts[:, None]
        order = np.argsort(centers[:, np.ptp(places, axis=0).argmax()], kind="stable")
        difference = np.abs(2 * np.cumsum(counts[order])[:-1] - len(regions))
        return names[order[: 1 + difference.argmin()]]
    # Every division once: the last region is never in the first part.
    first = np.arange(1, 2 ** (len(names) - 1))[:, None] >> np.arange(len(names)) & 1
    difference = np.abs(2 * first @ counts - len(regions))
    neighbors = np.abs(places[:, None] - places).sum(-1) == 1
    borders = member.T.astype(int) @ neighbors @ member  # pairs of neighbors of two regions
    border = (first @ borders * (1 - first)).sum(-1)
    return names[first[np.lexsort((border, difference))[0]] == 1]


def circle(center: float, size: int) -> Bool[np.ndarray, "{size} {size}"]:
    """A disc of half the area, horizontally at `center`: 0 left .. 1 right."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    radius = np.sqrt(0.5 / np.pi)
    return np.square(x - radius - center * (1 - 2 * radius)) + np.square(y - 0.5) <= radius**2


def rings(size: int) -> Int[np.ndarray, "{size} {size}"]:
    """Four rings of equal area around the center."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    order = np.argsort(np.argsort((x * x + y * y).ravel(), kind="stable"))
    return (4 * order // order.size).reshape(size, size)


def rectangle(size: int) -> Bool[np.ndarray, "{size} {size}"]:
    """A centered square of half the area."""
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


def ready_made(name: str, size: int = 256) -> Int32[np.ndarray, "{size} {size}"]:
    """A drawing by its name in `DRAWINGS`.

    Raises:
        UserError: there is no such drawing, or the size is no whole number in 1 .. 4096.
    """
    if name not in DRAWINGS:
        raise UserError(f"Unknown drawing {name!r}; choose one of {', '.join(DRAWINGS)}.")
    return DRAWINGS[name](check_integer("size", size, 1, 4096)).astype(np.int32)


# Pixels and noise.


def paste(
    original: np.ndarray,
    edited: np.ndarray,
    mask: np.ndarray,
    feather: int,
) -> Float32[np.ndarray, "*#batch H W 3"]:
    """The edited image inside a mask, the original outside, blended over `feather` pixels.

    Args:
        original, edited: float (..., H, W, 3) in [-1, 1], as `Pipeline.prepare` and samples are.
        mask: bool (H, W); all pixels in it come from the edited image.

    Raises:
        UserError: the images and the mask have different sizes, the images are not float in
            [-1, 1], the mask is not bool, or the feather is no whole number from 0.
    """
    original, edited = as_array(original), as_array(edited)
    for image in (original, edited):
        wrong = (
            "The images must be float (..., H, W, 3) in [-1, 1], as `Pipeline.prepare` and samples "
            f"are; got {image.dtype} {image.shape}"
        )
        if image.dtype.kind != "f" or image.shape[-1:] != (3,):
            raise UserError(f"{wrong}.")
        if not (abs(image) < 1.001).all():
            raise UserError(f"{wrong} in [{image.min():g}, {image.max():g}].")
    mask = as_array(mask)
    if mask.dtype != bool:
        raise UserError(f"A mask must be bool (H, W), as image > 127 is; got {mask.dtype}.")
    if not is_integer(feather) or feather < 0:
        raise UserError(f"feather must be a whole number of pixels, 0 or more, got {feather!r}.")
    sizes = np.shape(original)[-3:-1], np.shape(edited)[-3:-1], np.shape(mask)
    if len(set(sizes)) > 1:
        raise UserError(
            f"The images and the mask must have the same size, got {sizes[0]}, {sizes[1]} and "
            f"{sizes[2]}."
        )
    try:
        np.broadcast_shapes(original.shape, edited.shape)
    except ValueError:
        raise UserError(
            "There must be as many originals as edited images, or one; got images of the shapes "
            f"{original.shape} and {edited.shape}."
        ) from None
    weight, grown = mask.astype(np.float32), mask
    for step in range(1, feather + 1):
        padded = np.pad(grown, 1)
        grown = grown | padded[2:, 1:-1] | padded[:-2, 1:-1] | padded[1:-1, 2:] | padded[1:-1, :-2]
        weight = np.maximum(weight, np.where(grown, 1 - step / (feather + 1), 0))
    weight = weight[..., None]
    return (weight * edited + (1 - weight) * original).astype(np.float32)


def between(
    start: Float[np.ndarray, "*noise"], end: Float[np.ndarray, "..."], share: float
) -> Float[np.ndarray, "*noise"]:
    """Spherical interpolation of two noise arrays (..., L, K): `start` at 0, `end` at 1.

    Unlike a weighted mean, it keeps the norm that the sampler expects of each image's noise.
    `Pipeline.structure_noise` gives the noise of a seed.

    Raises:
        UserError: the arrays have different shapes, the noise of an image is zero, or the share is
            not a finite number.
    """
    share = check_finite("The share", share)  # one of NumPy would turn the result into float64
    if np.shape(start) != np.shape(end):
        raise UserError(
            f"Both noises must have the same shape, got {np.shape(start)} and {np.shape(end)}."
        )
    start, end = np.asarray(start), np.asarray(end)
    of_image = functools.partial(np.sum, axis=(-2, -1), keepdims=True)
    lengths = np.sqrt(of_image(start**2) * of_image(end**2))
    if not lengths.all():
        raise UserError("The noise of an image is zero everywhere, so it has no direction.")
    angle = np.arccos(np.clip(of_image(start * end) / lengths, -1, 1))
    parallel = np.sin(angle) < 1e-6
    sine = np.where(parallel, 1, np.sin(angle))
    weight = np.where(parallel, 1 - share, np.sin((1 - share) * angle) / sine)
    other = np.where(parallel, share, np.sin(share * angle) / sine)
    return weight * start + other * end
