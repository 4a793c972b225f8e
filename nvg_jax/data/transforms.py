"""From an encoded image to the numbers a model sees: one transform for all data sets."""

import dataclasses
import io

import numpy as np
from PIL import Image, UnidentifiedImageError


def decode(image: bytes | np.ndarray) -> Image.Image:
    """Makes an 8-bit RGB image of an image file's content or of a uint8 (H, W) or (H, W, 3).

    Gray becomes RGB, 16 bits become 8, transparent parts show white, CMYK and palettes are
    converted, an animation gives its first frame. An EXIF orientation is not applied.

    Raises:
        ValueError: the content is no image, a damaged one, or of a kind that has no RGB form.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image).convert("RGB")
    try:
        with Image.open(io.BytesIO(image)) as opened:
            opened.load()
            if opened.mode.startswith("I"):
                return Image.fromarray(_to_8_bits(np.asarray(opened))).convert("RGB")
            if opened.mode == "F":
                raise ValueError("floating-point values have no fixed range")
            if opened.has_transparency_data:
                rgba = opened.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert(
                    "RGB"
                )
            return opened.convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError("not an image of a known format") from error
    except Exception as error:  # damaged files raise errors of many kinds inside Pillow
        raise ValueError(f"not a readable image ({error})") from error


def _to_8_bits(gray: np.ndarray) -> np.ndarray:
    """0..65535 to uint8 0..255."""
    if gray.min() < 0 or gray.max() > 65535:
        raise ValueError(f"gray values of {gray.min()} to {gray.max()} do not fit into 16 bits")
    return np.round(gray / 257).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Transform:
    """Resize, crop and scale as the paper does for 256 pixels, without flips.

    The image is resized (Lanczos, aspect kept) until it just covers a rectangle of the shape of
    `image_size` whose short side is `resize`; then `image_size` is cropped, at random in training
    and from the center otherwise. For a square, `resize` is the short side of the resized image.

    Attributes:
        image_size: height and width of the result.
        resize: see above; None for 288/256 of the short side of `image_size`.
        pad: in training the resized image is extended by this many pixels on every side, with
            copies of its edge, before the crop. Where `resize` leaves no room to crop, this
            shifts the image by up to `pad` pixels.
    """

    image_size: tuple[int, int]
    resize: int | None = None
    pad: int = 0

    def __post_init__(self):
        if min(self.image_size) < 1 or self.pad < 0:
            raise ValueError(
                f"image_size {self.image_size} must be positive and pad {self.pad} not negative."
            )
        if self.resize is not None and self.resize < min(self.image_size):
            raise ValueError(
                f"Images resized to {self.resize} pixels cannot be cropped to image_size "
                f"{self.image_size}; resize must be at least {min(self.image_size)}."
            )

    @property
    def cover(self) -> tuple[int, int]:
        """The height and width that the resized image covers."""
        short = min(self.image_size)
        resize = round(short * 288 / 256) if self.resize is None else self.resize
        return tuple(round(n * resize / short) for n in self.image_size)

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> np.ndarray:
        """Gives float32 (H, W, 3) in [-1, 1]; `rng` draws the crop, None crops the center."""
        height, width = self.cover
        if height * image.width >= width * image.height:
            width = height * image.width // image.height
        else:
            height = width * image.height // image.width
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        if rng is None:
            top = round((height - self.image_size[0]) / 2)
            left = round((width - self.image_size[1]) / 2)
        else:
            top = rng.integers(-self.pad, height - self.image_size[0] + self.pad + 1)
            left = rng.integers(-self.pad, width - self.image_size[1] + self.pad + 1)
        # Rows and columns outside the image are copies of its edge.
        rows = np.arange(top, top + self.image_size[0]).clip(0, height - 1)
        columns = np.arange(left, left + self.image_size[1]).clip(0, width - 1)
        return np.asarray(image)[rows][:, columns].astype(np.float32) / 127.5 - 1
