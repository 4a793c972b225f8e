"""From an encoded image to the array that a model sees: one transform for all data sets."""

import contextlib
import dataclasses
import io
import math

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from nvg_jax.data import lanczos4
from nvg_jax.errors import UserError, is_failure

READ_AT = 3  # as reducing_gap of Image.resize, which Pillow calls indistinguishable from 3 on
RESIZE_FILTERS = ("lanczos", "published")
DEFAULT_FILTER = "lanczos"
PROGRAMS = ("EPS", "WMF")  # formats that Pillow reads by running what is in the file
WHOLE = "nvg_jax_whole"
LONG = 16  # an image this many times as long as its crop is not resized whole


def decode(
    image: bytes | np.ndarray | Image.Image,
    background: str = "white",
    enough: int | None = None,
) -> Image.Image:
    """Returns an 8-bit RGB image, turned as the camera was held by its EXIF orientation.

    Grayscale is repeated to RGB, 16 bits are scaled to 8, transparency is composited on the
    background, CMYK and palettes are converted, and an animation is reduced to its first frame.

    Args:
        image: content of an image file, an opened one, or uint8 (H, W) or (H, W, 3).
        enough: a JPEG with both sides at least twice as long is read at a half, a quarter or an
            eighth of its size, without decoding it whole. The sides are rounded up: `WHOLE` in the
            image's info is (its whole width and height, the box that they have become).

    Raises:
        UserError: not an image, one of `PROGRAMS`, a damaged one, or one that cannot be converted
            to RGB.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image).convert("RGB")
    try:
        if isinstance(image, Image.Image):
            return _to_rgb(image, background)
        with Image.open(io.BytesIO(image)) as opened:
            if opened.format in PROGRAMS:
                raise UserError(f"a program in {opened.format}; make it a PNG")
            if enough is not None:
                whole = opened.size
                if drafted := opened.draft(None, (enough, enough)):
                    opened.info[WHOLE] = whole, drafted[1]
            return _to_rgb(opened, background)
    except UnidentifiedImageError as error:
        raise UserError("not an image of a known format") from error
    except Exception as error:  # damaged files raise errors of many kinds inside Pillow
        if is_failure(error):
            raise
        raise UserError(f"not a readable image ({error})") from error


def _to_rgb(image: Image.Image, background: str) -> Image.Image:
    image.load()
    with contextlib.suppress(Exception):  # damaged EXIF data raise errors of many kinds
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        image = ImageOps.exif_transpose(image)
        if WHOLE in image.info and orientation != 1:  # 1 also if it has been turned already
            whole, box = image.info[WHOLE]
            image.info[WHOLE] = _turned(whole, box, image.size, orientation)
    if image.mode.startswith("I"):
        gray = np.asarray(image)
        rgb = Image.fromarray(_to_8_bits(gray)).convert("RGB")
        if "transparency" in image.info:  # one gray value
            rgb.paste(background, mask=Image.fromarray(gray == image.info["transparency"]))
        return rgb
    if image.mode == "F":
        raise UserError("floating-point values have no fixed range; convert it to 8 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, background)
        return Image.alpha_composite(ground, rgba).convert("RGB")
    return image.convert("RGB")


def _whole(image: Image.Image):
    """`WHOLE` of an image, also of one that was not read at a smaller size."""
    return image.info.get(WHOLE, (image.size, (0, 0, *image.size)))


def _turned(whole, box, size, orientation: int):
    """`WHOLE` of an image that was turned to `size`: (whole width and height, box)."""
    (width, height), (right, bottom) = whole, box[2:]
    if orientation in (5, 6, 7, 8):
        width, height, right, bottom = height, width, bottom, right
    left = size[0] - right if orientation in (2, 3, 6, 7) else 0
    top = size[1] - bottom if orientation in (3, 4, 7, 8) else 0
    return (width, height), (left, top, left + right, top + bottom)


def _to_8_bits(gray: np.ndarray) -> np.ndarray:
    """Scales 0..65535 to uint8 0..255."""
    if gray.min() < 0 or gray.max() > 65535:
        raise UserError(f"gray values of {gray.min()} to {gray.max()} do not fit in 16 bits")
    return np.round(gray / 257).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Transform:
    """Resizes, crops and scales like the paper at 256 pixels; no flips.

    The image is resized (aspect ratio kept) to just cover a rectangle with the aspect ratio of
    `image_size` and a short side of `resize`. Then `image_size` is cropped from it, at random in
    training and from the center otherwise. For a square `image_size`, `resize` is the short side of
    the resized image.

    Attributes:
        image_size: height and width of the result.
        resize: see above; 0 for 288/256 of the short side of `image_size`.
        pad: in training, the resized image is padded by this many pixels on every side, with
            copies of its edge, before the crop. If `resize` leaves no room to crop, this shifts
            the image by up to `pad` pixels.
        resize_filter: "lanczos" is antialiased (Pillow). "published" resizes as the images of the
            published weights were, without antialiasing (OpenCV), and rounds the long side and the
            place of the center crop as they do.

    Raises:
        UserError: a size that is not positive, `resize` smaller than the crop, or an unknown
            filter.
    """

    image_size: tuple[int, int]
    resize: int = 0
    pad: int = 0
    resize_filter: str = DEFAULT_FILTER

    def __post_init__(self):
        if self.resize_filter not in RESIZE_FILTERS:
            raise UserError(
                f"data.resize_filter must be one of {', '.join(RESIZE_FILTERS)}, got "
                f"{self.resize_filter!r}."
            )
        if min(self.image_size) < 1 or self.pad < 0:
            raise UserError(
                f"image_size must be positive and pad not negative, got {self.image_size} and "
                f"{self.pad}."
            )
        if self.resize and self.resize < min(self.image_size):
            raise UserError(
                f"Images resized to {self.resize} pixels cannot be cropped to image_size "
                f"{self.image_size}; resize must be at least {min(self.image_size)}."
            )

    @property
    def cover(self) -> tuple[int, int]:
        """Height and width that the resized image must cover."""
        short = min(self.image_size)
        resize = self.resize or round(short * 288 / 256)
        height, width = self.image_size
        return round(height * resize / short), round(width * resize / short)

    def decode(self, image: bytes | np.ndarray | Image.Image) -> Image.Image:
        """`decode` for this transform: a JPEG of many times its size is read at a smaller one.

        At `READ_AT` times what the resized image must cover, the difference cannot be seen, and a
        camera's picture is read several times as fast. The published filter reads all pixels.
        """
        published = self.resize_filter == "published"
        return decode(image, enough=None if published else READ_AT * max(self.cover))

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> np.ndarray:
        """Returns float32 (H, W, 3) in [-1, 1]; `rng` draws the crop, None takes the center."""
        whole, _ = _whole(image)
        height, width = size = self.resized(*whole[::-1])
        room = height - self.image_size[0], width - self.image_size[1]
        if rng is not None:
            top, left = (rng.integers(-self.pad, n + self.pad + 1) for n in room)
        elif self.resize_filter == "published":
            top, left = (n // 2 for n in room)
        else:
            top, left = (round(n / 2) for n in room)
        # Rows and columns outside the image are copies of its edge.
        rows = np.arange(top, top + self.image_size[0]).clip(0, height - 1)
        columns = np.arange(left, left + self.image_size[1]).clip(0, width - 1)
        if self.resize_filter == "published":
            pixels = lanczos4.resize(np.asarray(image), size, rows, columns)
        else:
            if image.size != (width, height):
                image, rows, columns = self._resize(image, rows, columns)
            pixels = np.asarray(image)[rows][:, columns]
        return pixels.astype(np.float32) / 127.5 - 1

    def _resize(self, image: Image.Image, rows: np.ndarray, columns: np.ndarray):
        """(resized image, rows and columns in it): of a very long image only the part around them.

        The resizing of a part rounds its source positions differently, in the last bit of float64,
        so images of usual shapes are resized whole.
        """
        whole, box = _whole(image)
        height, width = self.resized(*whole[::-1])
        top, left, bottom, right = 0, 0, height, width
        if height * width > LONG * math.prod(self.cover):
            top, left, bottom, right = rows[0], columns[0], rows[-1] + 1, columns[-1] + 1
        x = lambda n: box[0] + n * (box[2] - box[0]) / width
        y = lambda n: box[1] + n * (box[3] - box[1]) / height
        resized = image.resize(
            (int(right - left), int(bottom - top)),
            Image.Resampling.LANCZOS,
            box=(x(left), y(top), x(right), y(bottom)),
        )
        return resized, rows - top, columns - left

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width to which an image of height x width is resized."""
        rows, columns = self.cover
        if self.resize_filter == "published":
            scale = max(rows / height, columns / width)
            return round(height * scale), round(width * scale)
        if rows * width >= columns * height:
            return rows, rows * width // height
        return columns * height // width, columns
