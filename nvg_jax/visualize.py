"""Grids of images, reconstructions and stages as uint8 arrays (H, W, 3), and PNG files."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from nvg_jax.runtime.files import atomic_write

MIN_TILE = 64  # smaller tiles are enlarged by an integer factor to about this many pixels
GAP = 2  # pixels between tiles


def to_uint8(images) -> np.ndarray:
    """float [-1, 1] -> uint8: 255 * (x + 1) / 2, truncated. Values outside are clipped."""
    return (255 * (np.clip(np.asarray(images, np.float32), -1, 1) + 1) / 2).astype(np.uint8)


def image_grid(images, columns: int) -> np.ndarray:
    """Arranges images (B, H, W, 3), float [-1, 1] or uint8, in rows of `columns` on white."""
    images = np.asarray(images)
    if images.dtype != np.uint8:
        images = to_uint8(images)
    factor = max(1, MIN_TILE // images.shape[1])
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    grid = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + GAP), index % columns * (width + GAP)
        grid[top : top + height, left : left + width] = image
    return grid


def reconstruction_grid(images, reconstructions) -> np.ndarray:
    """Images (B, H, W, 3) in one row, their reconstructions in the row below."""
    return image_grid(np.concatenate([to_uint8(images), to_uint8(reconstructions)]), len(images))


def structure_colors(labels, num_labels: int) -> np.ndarray:
    """Colors the labels of a structure map: int (...) -> uint8 (..., 3).

    Hues follow the order of the labels around the color circle, so siblings have similar colors.
    """
    hue = (np.asarray(labels) + 0.5) / num_labels
    channels = [np.clip(np.abs((hue * 6 + shift) % 6 - 3) - 1, 0, 1) for shift in (0, 4, 2)]
    return (255 * (0.15 + 0.75 * np.stack(channels, -1))).astype(np.uint8)


def stages_grid(stage_images, structure, latent_size: tuple[int, int]) -> np.ndarray:
    """Shows generation stage by stage, from left to right, in two rows for each image.

    The upper row has the decoded canvas of each stage, the lower row its structure map.

    Args:
        stage_images: (B, S, H, W, 3) in [-1, 1], the canvas decoded after each stage.
        structure: int (B, S, L).
        latent_size: (h, w).
    """
    batch, stages, height, width, _ = np.shape(stage_images)
    tiles = []
    for images, maps in zip(to_uint8(stage_images), np.asarray(structure)):
        tiles.extend(images)
        for stage, labels in enumerate(maps):
            colors = structure_colors(labels.reshape(latent_size), 2**stage)
            tiles.append(np.asarray(Image.fromarray(colors).resize((width, height), Image.NEAREST)))
    return image_grid(np.stack(tiles), stages)


def png(image: np.ndarray) -> bytes:
    """Encodes a uint8 image (H, W, 3) as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def save_png(path: str | Path, image: np.ndarray):
    """Writes a uint8 image (H, W, 3) to a PNG file, atomically."""
    with atomic_write(Path(path)) as file:
        file.write(png(image))
