"""Reads from files what samples keep of an image or take from a drawing."""

import os

import numpy as np
from PIL import Image

from nvg_jax.data.transforms import decode
from nvg_jax.errors import UserError, reported
from nvg_jax.jobs.sampling_runs import Constraint
from nvg_jax.pipeline import Pipeline
from nvg_jax.runtime.storage import storage_path
from nvg_jax.sampling import control
from nvg_jax.sampling.settings import check_integer
from nvg_jax.tokenizer import GranularitySequence

MAX_REGIONS = 64  # regions of a drawing; more colors mean that its edges are smoothed


def read_picture(
    path: str | os.PathLike,
    size: tuple[int, int] | None = None,
    background: str = "white",
    enough: int | None = None,
) -> np.ndarray:
    """The pixels of a picture as the camera was held, uint8 (H, W, 3).

    Args:
        size: the height and width that it must have.
        background: what shows through where it is transparent.
        enough: as of `decode`.

    Raises:
        UserError: the file does not exist, is not a picture, or has another size.
    """
    path = storage_path(path)
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    with reported(f"{path} cannot be read"):
        content = path.read_bytes()
    try:
        pixels = np.asarray(decode(content, background, enough=enough))
    except UserError as error:
        raise UserError(f"{path} is {error}.") from error
    if size is not None and pixels.shape[:2] != size:
        raise UserError(
            f"{path} has {pixels.shape[0]} x {pixels.shape[1]} pixels and the image "
            f"{size[0]} x {size[1]}; the mask must have the size of the image."
        )
    return pixels


def keep_stages(
    pipeline: Pipeline, path: str | os.PathLike, structure_stages: int, token_stages: int
) -> Constraint:
    """The maps and tokens of the first stages of an image.

    Raises:
        UserError: a file that cannot be read, or stages that the model does not have.
    """
    check_integer("--structure_stages", structure_stages, 1, pipeline.tokenizer.config.num_stages)
    check_integer("--token_stages", token_stages, 0, structure_stages)
    sequence = pipeline.encode(pipeline.prepare(read_picture(path))[None])
    first = GranularitySequence(*(part[0] for part in sequence))
    return Constraint(first, structure_stages, token_stages)


def follow_drawing(pipeline: Pipeline, drawing: str | os.PathLike) -> Constraint:
    """The maps of a drawing: a PNG whose colors are regions, or the name of a ready-made one.

    Raises:
        UserError: it is neither, or a picture with one color or too many; or the model's samples
            follow no drawing.
    """
    pipeline.check_free_structure("follow a drawing")
    config = pipeline.tokenizer.config
    if isinstance(drawing, str) and drawing in control.DRAWINGS:
        regions = ready_made(drawing, config.image_size)
    elif not storage_path(drawing).is_file():
        raise UserError(
            f"--structure_map must be a file or one of {', '.join(control.DRAWINGS)}, got "
            f"{str(drawing)!r}."
        )
    else:
        pixels = resized(Image.fromarray(read_picture(drawing)), config.image_size)
        colors = np.asarray(pixels).astype(np.int32) @ np.array([1 << 16, 1 << 8, 1])
        count = len(np.unique(colors))
        if count > MAX_REGIONS:
            raise UserError(
                f"{drawing} has {count} colors, and each is a region; draw at most {MAX_REGIONS}, "
                "without smooth edges."
            )
        regions = colors
    structure, stages = control.structure_of_drawing(regions, config.latent_size)
    return Constraint(GranularitySequence(structure, np.zeros_like(structure)), stages, 0)


def ready_made(name: str, size: tuple[int, int]) -> np.ndarray:
    """A drawing of `control.DRAWINGS` in an image's size: int32 (H, W)."""
    return np.asarray(resized(Image.fromarray(control.ready_made(name, min(size))), size))


def resized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A picture in an image's size (H, W), with its own colors alone."""
    height, width = size
    return picture.resize((width, height), Image.Resampling.NEAREST)


def model_mask(pipeline: Pipeline, white: np.ndarray) -> np.ndarray:
    """The model's pixels (h, w) that hold any white of a mask, bool (H, W); both bool."""
    transform = pipeline.metadata.transform
    if white.shape != transform.image_size:
        for axis, count in enumerate(transform.resized(*white.shape)):
            edges = np.arange(count + 1) * white.shape[axis] / count
            first, last = np.floor(edges[:-1]).astype(int), np.ceil(edges[1:]).astype(int)
            lines = (white.take(range(*ends), axis).any(axis) for ends in zip(first, last))
            white = np.stack(list(lines), axis)
    colors = white[..., None].repeat(3, axis=-1) * np.uint8(255)
    return pipeline.prepare(colors).mean(-1) > 0  # crops it


def edit_region(
    pipeline: Pipeline,
    image: str | os.PathLike,
    mask: str | os.PathLike | None,
    start: int,
    feather: int | None,
) -> Constraint:
    """An image to be resampled where a mask is white, and not transparent.

    Args:
        start: the first stage to resample.
        feather: the number of pixels over which the original pixels outside of the mask are
            blended back in; None does not paste them.

    Raises:
        UserError: a file that cannot be read, a mask of another size or without white, or a stage
            that the model does not have.
    """
    check_integer("--edit_from", start, 0, pipeline.tokenizer.config.num_stages - 1)
    if mask is None:
        raise UserError("--edit needs --mask, a PNG that is white where the image may change.")
    pixels = read_picture(image)
    brightness = read_picture(mask, pixels.shape[:2], "black").mean(-1, keepdims=True)
    if brightness.max() <= 127:
        raise UserError(
            f"{mask} has no white: its brightest pixel is {brightness.max():.0f} of 255. Paint "
            "white (255) where the image may change."
        )
    inside = model_mask(pipeline, brightness[..., 0] > 127)
    if not inside.any():
        height, width = inside.shape
        raise UserError(
            "The model sees nothing of what the mask marks: it sees the middle of the picture, in "
            f"{height} x {width} pixels. Mark more, or crop the picture and its mask around it."
        )
    original = pipeline.prepare(pixels)
    region = control.region_of_mask(inside, pipeline.tokenizer.config.latent_size)
    sequence = GranularitySequence(*(part[0] for part in pipeline.encode(original[None])))
    constraint = Constraint(sequence, start, start, region)
    if feather is None:
        return constraint
    return constraint._replace(image=original, mask=inside, feather=feather)
