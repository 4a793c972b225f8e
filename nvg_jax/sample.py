"""Sampling: `python -m nvg_jax.sample --workdir=runs/digits --classes=0,1,2 --per_class=8`.

Writes a PNG for every sample, a grid of all, and a picture of the stages; or one .npz with
"arr_0", uint8 (N, H, W, 3), if --out ends in it. What is not given is taken from the folder's own
recommended settings.
"""

import logging
import time
from pathlib import Path

import numpy as np
from absl import flags

from nvg_jax import cli
from nvg_jax.pictures import image_grid, save_png, stages_grid, to_uint8
from nvg_jax.pipeline import Pipeline

GRID_LIMIT = 400  # samples in the grid
STAGES_LIMIT = 8  # samples in the picture of the stages

FLAGS = flags.FLAGS
logger = logging.getLogger("nvg_jax")


def define_flags():
    """The flags that sampling and evaluation share."""
    flags.DEFINE_string("workdir", None, "A run's folder, or an exported or converted one.")
    flags.DEFINE_integer("seed", 0, "Seed of all randomness.")
    flags.DEFINE_string("out", None, "Folder for the pictures, or a file ending in .npz.")
    flags.DEFINE_integer("batch_size", 64, "Samples made at once.", lower_bound=1)
    flags.DEFINE_float("temperature", None, "0 takes the most likely token.")
    for name in ("top_k", "top_p", "content_guidance", "structure_guidance"):
        flags.DEFINE_list(name, None, "A number, start,end, or one value a stage.")
    flags.DEFINE_integer("flow_steps", None, "Euler steps of a split.")
    flags.DEFINE_boolean("gumbel", None, "Draw the splits at random.")


def settings_from_flags() -> dict:
    """The sampling settings that the flags give, as `Pipeline.sample` takes them."""
    given = {name: FLAGS[name].value for name in ("temperature", "flow_steps", "gumbel")}
    for name in ("top_k", "top_p", "content_guidance", "structure_guidance"):
        values = FLAGS[name].value
        if values is not None:
            try:
                given[name] = tuple(float(value) for value in values)
            except ValueError:
                raise ValueError(f"--{name} takes numbers, got {','.join(values)!r}.") from None
    return given


def sample_batches(pipeline: Pipeline, class_ids, batch_size: int, seed: int, **settings):
    """Yields an Output for every `batch_size` of the class ids, and logs progress with an ETA."""
    start = time.monotonic()
    for first in range(0, len(class_ids), batch_size):
        part = class_ids[first : first + batch_size]
        filled = list(part) + [part[-1]] * (batch_size - len(part))  # one program for all
        out = pipeline.sample(filled, seed, first_index=first, **settings)
        done = first + len(part)
        remaining = (time.monotonic() - start) / done * (len(class_ids) - done)
        logger.info("%d of %d samples, ETA %d s", done, len(class_ids), remaining)
        keep = slice(len(part))
        yield out._replace(
            images=out.images[keep],
            sequence=type(out.sequence)(*(part[keep] for part in out.sequence)),
            canvases=out.canvases[keep],
        )


def stages_picture(pipeline: Pipeline, output, picks: np.ndarray) -> np.ndarray:
    """The samples `picks` of an Output: the canvases after every stage above their maps."""
    canvases = output.canvases[picks]
    images = pipeline.decode_canvas(canvases.reshape(-1, *canvases.shape[2:]))
    return stages_grid(
        images.reshape(*canvases.shape[:2], *images.shape[1:]),
        output.sequence.structure[picks],
        pipeline.tokenizer.config.latent_size,
    )


def main(_):
    pipeline = Pipeline.from_pretrained(FLAGS.workdir)
    pipeline.check_can_sample()
    names = FLAGS.classes or range(len(pipeline.class_names))
    ids = [pipeline.class_id(name) for name in names for _ in range(FLAGS.per_class)]
    out = Path(FLAGS.out)
    batch_size = min(FLAGS.batch_size, len(ids))
    batches = sample_batches(pipeline, ids, batch_size, FLAGS.seed, **settings_from_flags())
    if out.suffix == ".npz":
        images = np.concatenate([to_uint8(batch.images) for batch in batches])
        out.parent.mkdir(parents=True, exist_ok=True)
        np.savez(out, arr_0=images)
        print(f"{len(images)} samples: {out}")
        return
    out.mkdir(parents=True, exist_ok=True)
    images, first = [], None
    for batch in batches:
        first = first or batch
        for image in to_uint8(batch.images):
            save_png(out / f"{len(images):06d}_class{ids[len(images)]}.png", image)
            images.append(image)
    shown = images[:GRID_LIMIT]
    save_png(out / "grid.png", image_grid(np.stack(shown), columns=min(FLAGS.per_class, 20)))
    picks = np.unique(np.linspace(0, len(first.images) - 1, STAGES_LIMIT).astype(int))
    save_png(out / "stages.png", stages_picture(pipeline, first, picks))
    print(f"{len(images)} samples, grid.png and stages.png: {out}")


if __name__ == "__main__":
    define_flags()
    flags.DEFINE_list("classes", None, "Class names or ids; all classes if not given.")
    flags.DEFINE_integer("per_class", 8, "Samples of each class.", lower_bound=1)
    flags.mark_flags_as_required(["workdir", "out"])
    cli.run(main)
