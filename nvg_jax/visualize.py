"""Grids of images with labels as uint8 arrays (H, W, 3), and PNG files."""

import contextlib
import io
import itertools
import os
import unicodedata
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from nvg_jax.errors import UserError
from nvg_jax.runtime.storage import storage_path, write_file

ROUNDING = 1e-4  # of a gray level
MIN_TILE = 64  # smaller tiles are enlarged by an integer factor to about this many pixels
GAP = 2  # pixels between tiles
FONT_SIZE = 12  # at least; a tenth of a large tile
# For letters outside ASCII, if a system has them: on Linux, macOS, and of Chinese or Japanese.
FONTS = ("DejaVuSans.ttf", "Arial Unicode.ttf", "NotoSansCJK-Regular.ttc")
UNUSED = "\U000ffffd"  # no font has it, so it is drawn as the box of missing letters


def to_uint8(images) -> np.ndarray:
    """float [-1, 1] -> uint8: 255 * (x + 1) / 2, truncated. Values outside are clipped.

    Images that are uint8 already stay as they are, and so do pixels v given as v / 127.5 - 1,
    which rounding makes up to 2e-5 smaller: `ROUNDING` is added.

    Raises:
        UserError: other integers or bool, whose range is unknown.
    """
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind in "biu":
        raise UserError(f"Expected images in uint8, or float in [-1, 1], got {images.dtype}.")
    pixels = 255 * (np.clip(images.astype(np.float32), -1, 1) + 1) / 2
    return (pixels + ROUNDING).clip(0, 255).astype(np.uint8)


def image_grid(images, columns: int, tile: int = MIN_TILE) -> np.ndarray:
    """Arranges images (B, H, W, 3), float in [-1, 1] or uint8, in rows of `columns` on white.

    Images of fewer than `tile` pixels are enlarged by an integer factor to about as many.
    """
    images = to_uint8(images)
    factor = max(1, tile // images.shape[1])
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    grid = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + GAP), index % columns * (width + GAP)
        grid[top : top + height, left : left + width] = image
    return grid


def reconstruction_grid(images, reconstructions, *, columns: Sequence[str] = ()) -> np.ndarray:
    """Images (B, H, W, 3) of either kind in one row, their reconstructions in the row below.

    Args:
        columns: a label above each image.
    """
    rows = [to_uint8(images), to_uint8(reconstructions)]
    return labeled_grid(rows, ["image", "reconstruction"], columns or [""] * len(images))


def class_grid(images, names: Sequence[str], columns: int) -> np.ndarray:
    """Images (B, H, W, 3) of either kind in rows, with the names of their classes before them.

    Every class begins a new row.

    Args:
        names: the class of every image; those of a class are neighbors.
    """
    images, tiles, rows, start = to_uint8(images), [], [], 0
    for name, group in itertools.groupby(names):
        count = len(list(group))
        for first in range(start, start + count, columns):
            row = images[first : min(first + columns, start + count)]
            padding = ((0, columns - len(row)), (0, 0), (0, 0), (0, 0))
            tiles.append(np.pad(row, padding, constant_values=255))
            rows.append(name)
        start += count
    return labeled_grid(tiles, rows, [""] * columns)


def structure_colors(labels, stage: int) -> np.ndarray:
    """Colors the labels 0 .. 2**stage - 1 of a structure map: int (...) -> uint8 (..., 3).

    Hues follow the order of the labels, from red to violet, so that children have colors around
    their parent's. From the fourth bit on, hues alone cannot be told apart, so siblings also differ
    in lightness, less at finer stages. The color space is Oklch
    (https://www.w3.org/TR/css-color-4/#ok-lab), in which equal steps look equal.
    """
    labels = np.asarray(labels)
    lightness = np.full(labels.shape, 0.72)
    for bit in range(3, stage):
        lightness += np.where(labels >> (stage - 1 - bit) & 1, 0.1, -0.1) * 0.6 ** (bit - 3)
    hue = np.deg2rad(20 + 310 * (labels + 0.5) / 2**stage)
    a, b = 0.14 * np.cos(hue), 0.14 * np.sin(hue)
    lms = np.stack(
        [
            lightness + 0.3963377774 * a + 0.2158037573 * b,
            lightness - 0.1055613458 * a - 0.0638541728 * b,
            lightness - 0.0894841775 * a - 1.2914855480 * b,
        ],
        axis=-1,
    )
    to_rgb = [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
    linear = np.clip(lms**3 @ np.transpose(to_rgb), 0, 1)
    srgb = np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (255 * srgb + 0.5).astype(np.uint8)


def map_tile(
    labels: np.ndarray, stage: int, latent_size: tuple[int, int], image_size: tuple[int, int]
) -> np.ndarray:
    """The structure map of a stage, int (L,), colored and resized to an image: (H, W, 3)."""
    colors = structure_colors(np.reshape(labels, latent_size), stage)
    height, width = image_size
    return np.asarray(Image.fromarray(colors).resize((width, height), Image.Resampling.NEAREST))


def marked(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """An image, uint8 (H, W, 3), tinted where a mask, bool (H, W), is set."""
    tinted = image // 2 + np.array([127, 22, 75], np.uint8)  # half of a pink
    return np.where(mask[..., None], tinted, image)


def label_font(texts: Sequence[str], size: int):
    """(a font, the texts in its letters): one of the system for letters that Pillow's lacks.

    Letters that no font has lose their accents, or become question marks.
    """
    letters = {letter for text in texts for letter in text if not letter.isascii()}
    fonts = [ImageFont.load_default(size)]
    for name in FONTS if letters else ():
        with contextlib.suppress(OSError):
            fonts.append(ImageFont.truetype(name, size))

    def lacking(font) -> set[str]:
        box = bytes(font.getmask(UNUSED))
        return {letter for letter in letters if bytes(font.getmask(letter)) == box}

    font = min(fonts, key=lambda font: len(lacking(font)))
    plain = lambda letter: unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode()
    table = {ord(letter): plain(letter) or "?" for letter in lacking(font)}
    return font, [text.translate(table) for text in texts]


def labeled_grid(
    tiles, rows: Sequence[str], columns: Sequence[str], tile: int = MIN_TILE
) -> np.ndarray:
    """Tiles in rows and columns, with a label before each row and one above each column.

    A label shared by neighboring columns is written once. One that is wider than its columns is
    broken at its spaces.

    Args:
        tiles: uint8 (R, C, H, W, 3), or nested lists of tiles.
        tile: as of `image_grid`.
    """
    tiles = np.asarray(tiles)
    grid = image_grid(tiles.reshape(-1, *tiles.shape[2:]), len(columns), tile)
    height, width, _ = grid.shape
    tile_height, tile_width = ((x + GAP) / len(n) for x, n in ((height, rows), (width, columns)))
    font_size = max(FONT_SIZE, int(tile_height) // 10)
    font, texts = label_font([*rows, *columns], font_size)
    rows, columns = texts[: len(rows)], texts[len(rows) :]
    left = GAP * 4 + max(int(np.ceil(font.getlength(text))) for text in rows)
    heads = []  # (the middle of its columns, what is written above them)
    for text, group in itertools.groupby(enumerate(columns), lambda column: column[1]):
        numbers = [number for number, _ in group]
        if font.getlength(text) > len(numbers) * tile_width:
            text = text.replace(" ", "\n")
        heads.append((left + (np.mean(numbers) + 0.5) * tile_width - GAP / 2, text))
    lines = 1 + max(text.count("\n") for _, text in heads)
    top = font_size * (2 * lines + 1) // 2 if any(columns) else 0
    picture = Image.new("RGB", (left + width, top + height), "white")
    picture.paste(Image.fromarray(grid), (left, top))
    draw = ImageDraw.Draw(picture)
    for row, text in enumerate(rows):
        middle = top + (row + 0.5) * tile_height - GAP / 2
        draw.text((left - 3 * GAP, middle), text, "black", font, anchor="rm")
    for middle, text in heads:
        draw.text((middle, top / 2), text, "black", font, anchor="mm", align="center", spacing=0)
    return np.asarray(picture)


def png(image: np.ndarray, **texts: str) -> bytes:
    """Encodes a uint8 image (H, W, 3) as a PNG file, with texts by their names."""
    file, info = io.BytesIO(), PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    Image.fromarray(image).save(file, "png", pnginfo=info)
    return file.getvalue()


def save_png(path: str | os.PathLike, image: np.ndarray, **texts: str):
    """Writes a uint8 image (H, W, 3) to a PNG file, atomically; `texts` as of `png`."""
    write_file(storage_path(path), png(image, **texts))
