"""What happens to images before the discriminator: DiffAug, then the way to its input size.

Everything is a pure function of images and key, differentiable with respect to the images, and
draws for every image on its own. Images are float32 (B, H, W, 3) in [-1, 1]; 0 is gray. Two calls
with one key treat image b of both batches alike.
"""

import jax
import jax.numpy as jnp
import numpy as np


def resample(images, rows, columns):
    """Images (B, H, W, 3), rows (B, y, H), columns (B, x, W) -> weighted sums (B, y, x, 3).

    Shifts, crops and area averages are all of this form. Products of matrices follow the batch
    over a mesh without communication; HIGHEST keeps a plain copy exact where the default
    precision is lower than float32.
    """
    images = jnp.einsum("byh,bhwc->bywc", rows, images, precision="highest")
    return jnp.einsum("bxw,bywc->byxc", columns, images, precision="highest")


def selection(start, count: int, size: int):
    """float32 (B, count, size) that picks `count` neighbors from `start` int (B,) on.

    Positions outside 0 .. size - 1 give zeros.
    """
    wanted = start[:, None] + jnp.arange(count)
    return (wanted[..., None] == jnp.arange(size)).astype(jnp.float32)


def translate(images, key, ratio: float = 1 / 8):
    """Shifts by whole pixels, at most `ratio` of the side each way; zeros come in at the edge."""
    matrices = []
    for axis_key, size in zip(jax.random.split(key), images.shape[1:3]):
        limit = int(size * ratio + 0.5)
        shift = jax.random.randint(axis_key, images.shape[:1], -limit, limit + 1)
        matrices.append(selection(-shift, size, size))
    return resample(images, *matrices)


def color(images, key):
    """Brightness + U(-0.5, 0.5), then saturation x U(0, 2), then contrast x U(0.5, 1.5).

    Saturation stretches a pixel's distances from its mean over the channels, contrast those from
    the mean of the whole image. Nothing is clipped.
    """
    shape = (len(images), 1, 1, 1)
    for_brightness, for_saturation, for_contrast = jax.random.split(key, 3)
    images = images + jax.random.uniform(for_brightness, shape, minval=-0.5, maxval=0.5)
    gray = images.mean(-1, keepdims=True)
    images = gray + (images - gray) * jax.random.uniform(for_saturation, shape, maxval=2.0)
    mean = images.mean((1, 2, 3), keepdims=True)
    contrast = jax.random.uniform(for_contrast, shape, minval=0.5, maxval=1.5)
    return mean + (images - mean) * contrast


def cutout(images, key, ratio: float = 0.2):
    """Sets a rectangle of `ratio` of each side to zero; its center may lie anywhere in the image.

    So near an edge only a part of it, at least half of each side, falls on the image.
    """
    inside = []
    for axis_key, size in zip(jax.random.split(key), images.shape[1:3]):
        length = int(size * ratio + 0.5)
        center = jax.random.randint(axis_key, images.shape[:1], 0, size + 1 - length % 2)
        place = jnp.arange(size) - (center - length // 2)[:, None]
        inside.append((0 <= place) & (place < length))
    cut = inside[0][:, :, None, None] & inside[1][:, None, :, None]
    return jnp.where(cut, 0.0, images)


def augment(images, key):
    """DiffAug (Zhao et al. 2020): translation, color and cutout, all three on every image."""
    for_translation, for_color, for_cutout = jax.random.split(key, 3)
    return cutout(color(translate(images, for_translation), for_color), for_cutout)


def area_matrix(size: int, target: int) -> np.ndarray:
    """float32 (target, size), each row the mean of the pixels that a target pixel touches.

    This is adaptive average pooling: target pixel i takes floor(i r) up to ceil((i + 1) r), with
    r = size / target, all with the same weight.
    """
    matrix = np.zeros((target, size), np.float32)
    for i in range(target):
        first, end = i * size // target, -(-(i + 1) * size // target)
        matrix[i, first:end] = 1 / (end - first)
    return matrix


def discriminator_input(images, key, size: int = 224):
    """Images (B, size, size, 3): for every image a random crop or, as often, an area resize.

    Images that already have the size are returned as they are.

    Raises:
        ValueError: the images are smaller than `size`.
    """
    batch, height, width, _ = images.shape
    if (height, width) == (size, size):
        return images
    if min(height, width) < size:
        raise ValueError(
            f"The discriminator's input is {size} x {size} and cannot be cut from images of "
            f"{height} x {width}. Use larger images or a smaller discriminator input."
        )
    for_choice, *axis_keys = jax.random.split(key, 3)
    crop = jax.random.bernoulli(for_choice, shape=(batch, 1, 1))
    matrices = []
    for axis_key, full in zip(axis_keys, (height, width)):
        start = jax.random.randint(axis_key, (batch,), 0, full - size + 1)
        cropped = selection(start, size, full)
        matrices.append(jnp.where(crop, cropped, area_matrix(full, size)))
    return resample(images, *matrices)
