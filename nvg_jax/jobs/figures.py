"""The paper's figures for any model, as labeled pictures.

Each function returns a picture, uint8 (H, W, 3).
"""

from collections.abc import Sequence

import numpy as np

from nvg_jax.jobs import editing
from nvg_jax.jobs.sampling_runs import SamplingJob
from nvg_jax.pipeline import Pipeline
from nvg_jax.sampling import control
from nvg_jax.tokenizer import GranularitySequence
from nvg_jax.visualize import labeled_grid, map_tile, to_uint8


def picture_of(pipe: Pipeline, labels: np.ndarray, stage: int) -> np.ndarray:
    config = pipe.tokenizer.config
    return map_tile(labels, stage, config.latent_size, config.image_size)


def binary(pipe: Pipeline, classes: Sequence[int], columns: int, seed: int) -> np.ndarray:
    """Samples next to their first map and its two halves (Figure 5): one row per class."""
    config = pipe.tokenizer.config
    out = pipe.sample(np.repeat(classes, columns), seed=seed)
    tiles = []
    for image, structure in zip(to_uint8(out.images), out.sequence.structure):
        patch = [n // m for n, m in zip(config.image_size, config.latent_size)]
        half = np.kron(structure[1].reshape(config.latent_size), np.ones(patch))[..., None] == 1
        faded = (image // 4 + 191).astype(np.uint8)
        tiles.append([image, picture_of(pipe, structure[1], 1)])
        tiles[-1] += [np.where(half == side, image, faded) for side in (False, True)]
    tiles = [sum(tiles[row * columns : (row + 1) * columns], []) for row in range(len(classes))]
    heads = ["sample", "first map", "one half", "other half"] * columns
    return labeled_grid(tiles, [pipe.class_names[c] for c in classes], heads)


def drawings(pipe: Pipeline, classes: Sequence[int], seed: int) -> np.ndarray:
    """Samples of every class that follow each ready-made map (Figure 6): one row per map."""
    tiles = []
    for name in control.DRAWINGS:
        constraint = editing.follow_drawing(pipe, name)
        out = SamplingJob(pipe, classes, 1, len(classes), seed, {}, constraint).sample(0)
        last = constraint.structure_stages - 1  # the finest map that the drawing determines
        shown = picture_of(pipe, constraint.sequence.structure[last], last)
        tiles.append([shown, *to_uint8(out.images)])
    heads = ["map", *(pipe.class_names[c] for c in classes)]
    return labeled_grid(tiles, [name.replace("_", " ") for name in control.DRAWINGS], heads)


def reuse(
    pipe: Pipeline, images: np.ndarray, names: Sequence[str], classes: Sequence[int], seed: int
) -> np.ndarray:
    """Samples of every class with all maps of each image: one row per image.

    Args:
        images: float32 (B, H, W, 3) in [-1, 1].
        names: of the images.
    """
    encoded, count = pipe.encode(images), len(classes)
    out = pipe.sample(
        np.tile(classes, len(images)),
        seed=seed,
        prefix=GranularitySequence(*(part.repeat(count, axis=0) for part in encoded)),
        structure_stages=pipe.tokenizer.config.num_stages,
    )
    samples = to_uint8(out.images).reshape(len(images), count, *out.images.shape[1:])
    given = to_uint8(np.stack([images, pipe.decode(encoded)], axis=1))
    heads = ["image", "restored", *(pipe.class_names[c] for c in classes)]
    return labeled_grid(np.concatenate([given, samples], axis=1), names, heads)


def stages(pipe: Pipeline, class_id: int, columns: int, seed: int) -> np.ndarray:
    """What each stage decides (Figure 8): samples that keep more and more stages of one sample.

    On the left, only the maps are kept; on the right, maps and tokens.
    """
    config = pipe.tokenizer.config
    one = pipe.sample([class_id], seed=seed)
    prefix = GranularitySequence(*(part.repeat(columns, axis=0) for part in one.sequence))
    tiles = []
    for kept in range(config.num_stages + 1):
        row = [to_uint8(one.images[0])]
        for token_stages in (0, kept):
            out = pipe.sample(
                [class_id] * columns,
                seed=seed,
                first_index=1,
                prefix=prefix,
                structure_stages=kept,
                token_stages=token_stages,
            )
            row += list(to_uint8(out.images))
        tiles.append(row)
    rows = [f"{kept} stage{'' if kept == 1 else 's'} kept" for kept in range(config.num_stages + 1)]
    return labeled_grid(
        tiles, rows, ["kept of", *["maps kept"] * columns, *["maps and tokens"] * columns]
    )
