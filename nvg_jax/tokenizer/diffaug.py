"""Prepares images for the discriminator: DiffAug, then a crop or resize to its input size.

All functions are pure, differentiable with respect to the images, and draw separately for each
image, except for the choice between crop and resize. Images are in [-1, 1]; 0 is gray. Two calls
with the same key apply the same transformations to image b of both batches.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float32, Int, PRNGKeyArray

from nvg_jax.errors import UserError


def resample(
    images: Float[Array, "B H W 3"], rows: Float[Array, "B y H"], columns: Float[Array, "B x W"]
) -> Float[Array, "B y x 3"]:
    """Weighted sums of the pixels of images.

    Shifts, crops and area averages all have this form. Matrix products need no communication when
    the batch is sharded over a mesh. Precision "highest" keeps copied pixels exact where the
    default precision is below float32.
    """
    images = jnp.einsum("byh,bhwc->bywc", rows, images, precision="highest")
    return jnp.einsum("bxw,bywc->byxc", columns, images, precision="highest")


def selection(start: Int[Array, " B"], count: int, size: int) -> Float32[Array, "B {count} {size}"]:
    """Selects `count` adjacent positions, the first at `start`.

    Positions outside 0 .. size - 1 give zeros.
    """
    positions = start[:, None] + jnp.arange(count)
    return (positions[..., None] == jnp.arange(size)).astype(jnp.float32)


def translate(
    images: Float[Array, "B H W 3"], key: PRNGKeyArray, ratio: float = 1 / 8
) -> Float[Array, "B H W 3"]:
    """Shifts by whole pixels, up to `ratio` of the side in each direction; fills with zeros."""
    matrices = []
    for axis_key, size in zip(jax.random.split(key), images.shape[1:3]):
        limit = int(size * ratio + 0.5)
        shift = jax.random.randint(axis_key, images.shape[:1], -limit, limit + 1)
        matrices.append(selection(-shift, size, size))
    return resample(images, *matrices)


def color(images: Float[Array, "B H W 3"], key: PRNGKeyArray) -> Float[Array, "B H W 3"]:
    """Brightness + U(-0.5, 0.5), then saturation x U(0, 2), then contrast x U(0.5, 1.5).

    Saturation scales the deviation of each pixel from its channel mean, contrast the deviation
    from the mean of the whole image. Nothing is clipped.
    """
    shape = (len(images), 1, 1, 1)
    for_brightness, for_saturation, for_contrast = jax.random.split(key, 3)
    images = images + jax.random.uniform(for_brightness, shape, minval=-0.5, maxval=0.5)
    gray = images.mean(-1, keepdims=True)
    images = gray + (images - gray) * jax.random.uniform(for_saturation, shape, maxval=2.0)
    mean = images.mean((1, 2, 3), keepdims=True)
    contrast = jax.random.uniform(for_contrast, shape, minval=0.5, maxval=1.5)
    return mean + (images - mean) * contrast


def cutout(
    images: Float[Array, "B H W 3"], key: PRNGKeyArray, ratio: float = 0.2
) -> Float[Array, "B H W 3"]:
    """Zeros a rectangle of `ratio` of each side, centered anywhere in the image.

    Near an edge only part of the rectangle, at least half of each side, lies within the image.
    """
    inside = []
    for axis_key, size in zip(jax.random.split(key), images.shape[1:3]):
        length = int(size * ratio + 0.5)
        center = jax.random.randint(axis_key, images.shape[:1], 0, size + 1 - length % 2)
        offset = jnp.arange(size) - (center - length // 2)[:, None]
        inside.append((0 <= offset) & (offset < length))
    cut = inside[0][:, :, None, None] & inside[1][:, None, :, None]
    return jnp.where(cut, 0.0, images)


def augment(images: Float[Array, "B H W 3"], key: PRNGKeyArray) -> Float[Array, "B H W 3"]:
    """DiffAug (Zhao et al. 2020): translation, color and cutout, all applied to every image."""
    for_translation, for_color, for_cutout = jax.random.split(key, 3)
    return cutout(color(translate(images, for_translation), for_color), for_cutout)


def area_matrix(size: int, target: int) -> Float32[np.ndarray, "{target} {size}"]:
    """The matrix of adaptive average pooling along one side.

    Target pixel i is the unweighted mean of the pixels from floor(i r) up to, but not including,
    ceil((i + 1) r), with r = size / target.
    """
    matrix = np.zeros((target, size), np.float32)
    for i in range(target):
        first, end = i * size // target, -(-(i + 1) * size // target)
        matrix[i, first:end] = 1 / (end - first)
    return matrix


def discriminator_input(
    images: Float[Array, "B H W 3"], key: PRNGKeyArray, size: int = 224
) -> Float[Array, "B {size} {size} 3"]:
    """A random crop or an area resize of the images, equally likely.

    The whole batch is either cropped, each image at its own place, or resized. Images that already
    have this size are returned unchanged.

    Raises:
        UserError: H or W is smaller than `size`.
    """
    batch, height, width, _ = images.shape
    if (height, width) == (size, size):
        return images
    if min(height, width) < size:
        raise UserError(
            f"The discriminator's input is {size} x {size} and cannot be cut from images of "
            f"{height} x {width}. Use larger images, or a discriminator for small images "
            "(--config.tokenizer_training.discriminator=small)."
        )
    for_choice, *axis_keys = jax.random.split(key, 3)
    crop = jax.random.bernoulli(for_choice)
    matrices = []
    for axis_key, full in zip(axis_keys, (height, width)):
        start = jax.random.randint(axis_key, (batch,), 0, full - size + 1)
        cropped = selection(start, size, full)
        matrices.append(jnp.where(crop, cropped, area_matrix(full, size)))
    return resample(images, *matrices)
