"""How well samples follow user input: `python -m benchmarks.control`.

Uses the bundled Fashion-MNIST model or another model of the same data (`--workdir`), and needs the
data set (docs/data.md). First, 50 samples of each class follow a ready-made map; they are encoded
again, and their own first map is compared with the given one. A map and its inverse count as equal.
Chance is the same measure for free samples. Then held-out images are edited: a region is resampled
for another class, and a classifier trained on real images classifies the result. Finally, or alone
with `--reach`, the canvas of held-out images is replaced at one position, and the change of the
pixels is measured by their distance from the patch of this position: as decoded, and with the
statistics of the decoder's group normalizations fixed at those of the unchanged image.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from nvg_jax.evaluation.judges import train_classifier
from nvg_jax.evaluation.sets import load_split
from nvg_jax.pipeline import Pipeline
from nvg_jax.sampling import control
from nvg_jax.tokenizer import GranularitySequence, Tokenizer
from nvg_jax.visualize import image_grid, save_png, to_uint8

FLAGS = flags.FLAGS
DATA = {"name": "fashion_mnist", "data_dir": "", "resize": 32}
BINARY = ("left_right", "top_bottom", "circle_center", "circle_left", "rectangle")
RING = 4  # pixels, the width of a ring of equal distance


def agreement(pipe: Pipeline, images: np.ndarray, wanted: np.ndarray) -> float:
    same = (pipe.encode(np.clip(images, -1, 1)).structure[:, 1] == wanted).mean(1)
    return np.maximum(same, 1 - same).mean()


def fixed_statistics(call, args, kwargs, context):
    """A flax interceptor: group normalization with the statistics of the first image for all."""
    norm = context.module
    if not isinstance(norm, nn.GroupNorm):
        return call(*args, **kwargs)
    (x,), params = args, norm.variables["params"]
    groups = x.reshape(*x.shape[:-1], norm.num_groups, -1)
    mean = groups[:1].mean((1, 2, 4), keepdims=True)
    variance = jnp.square(groups[:1] - mean).mean((1, 2, 4), keepdims=True)
    normalized = (groups - mean) * jax.lax.rsqrt(variance + norm.epsilon)
    return normalized.reshape(x.shape) * params["scale"] + params["bias"]


@functools.partial(jax.jit, static_argnames="tokenizer")
def changes(tokenizer: Tokenizer, params, canvas, vectors):
    """Mean absolute changes of the pixels after replacing a canvas at each of its positions.

    Args:
        canvas: (L, D). vectors: (L, D), what each position is replaced by.

    Returns:
        Two arrays (L, H, W), in 1/255 of the range of pixels: as decoded, and with fixed
        statistics. They are not clamped.
    """
    count = len(canvas)
    canvas = jnp.repeat(canvas[None], count + 1, axis=0)  # the first one stays
    canvas = canvas.at[jnp.arange(1, count + 1), jnp.arange(count)].set(vectors)
    decode = lambda: tokenizer.bind({"params": params}).decode_unclamped(canvas)
    plain = decode()
    with nn.intercept_methods(fixed_statistics):
        fixed = decode()
    return [127.5 * jnp.abs(images[1:] - images[:1]).mean(-1) for images in (plain, fixed)]


def distances(image_size: tuple[int, int], latent_size: tuple[int, int]) -> np.ndarray:
    """int (L, H, W): how many rows or columns, whichever are more, a pixel is outside a patch."""

    def along(size: int, count: int) -> np.ndarray:
        patch, pixel = size // count, np.arange(size)
        first = patch * np.arange(count)[:, None]
        return np.maximum(first - pixel, pixel - first - patch + 1).clip(0)

    rows, columns = (along(*sizes) for sizes in zip(image_size, latent_size))
    both = np.maximum(rows[:, None, :, None], columns[None, :, None, :])
    return both.reshape(-1, *image_size)


def measure_reach(pipe: Pipeline, images: np.ndarray):
    """Prints how much pixels change with one position of the canvas, by distance.

    The new vector is that of a random position of another image.
    """
    tokenizer, params = pipe.tokenizer, pipe.params["tokenizer"]
    canvases = pipe.canvases(pipe.encode(images))[:, -1]
    rng = np.random.default_rng(0)
    found = np.mean(
        [
            changes(tokenizer, params, canvas, rng.permutation(other))
            for canvas, other in zip(canvases, np.roll(canvases, 1, axis=0))
        ],
        axis=0,
    )
    distance = distances(tokenizer.config.image_size, tokenizer.config.latent_size)
    rings = -(-distance // RING)
    print("distance, pixels | change of a pixel, 1/255 | with fixed statistics")
    for ring in range(rings.max() + 1):
        name = f"{RING * (ring - 1) + 1} to {RING * ring}" if ring else "inside"
        plain, fixed = found[:, rings == ring].mean(1)
        print(f"{name} | {plain:.2f} | {fixed:.2f}")


def main(_):
    logging.set_verbosity(logging.WARNING)  # Orbax logs every file that it reads
    pipe = Pipeline.from_pretrained(FLAGS.workdir)
    if not FLAGS.reach:
        measure_control(pipe)
    measure_reach(pipe, load_split(DATA, "test", (32, 32)).images[:50])


def measure_control(pipe: Pipeline):
    latent, classes = pipe.tokenizer.config.latent_size, np.arange(10).repeat(50)
    free = pipe.sample(classes, seed=0)
    print("given map | first map of the encoded samples agrees | of free samples (chance)")
    for name in BINARY:
        structure, stages = control.structure_of_drawing(control.ready_made(name, 32), latent)
        repeat = np.broadcast_to(structure, (len(classes), *structure.shape))
        prefix = GranularitySequence(repeat, np.zeros_like(repeat))
        out = pipe.sample(classes, seed=0, prefix=prefix, structure_stages=stages)
        assert (out.sequence.structure[:, 1] == structure[1]).all()
        found = [agreement(pipe, images, structure[1]) for images in (out.images, free.images)]
        print(f"{name:14} | {found[0]:.1%} | {found[1]:.1%}")
    free_own = [free.sequence.structure[:, 1] == pipe.encode(free.images).structure[:, 1]]
    same = np.mean(free_own, axis=(0, 2))
    print(f"free samples with their own map: {np.maximum(same, 1 - same).mean():.1%}\n")

    train, test = (load_split(DATA, split, (32, 32)) for split in ("train", "test"))
    judge = train_classifier(train.images, train.labels, 10)
    images = test.images[:500]
    wanted = (test.labels[:500] + 1 + np.arange(500) % 9) % 10
    sequence = pipe.encode(images)
    restored = pipe.decode(sequence)
    rows, columns = np.mgrid[:32, :32]
    print("edited region | from stage | named as the new class | as the old | PSNR outside, dB")
    shown = [to_uint8(images[:12])]
    for name, mask in (
        ("middle half", (columns >= 8) & (columns < 24)),
        ("right half", columns >= 16),
        ("all but the upper left quarter", (columns >= 16) | (rows >= 16)),
    ):
        region = control.region_of_mask(mask, latent)
        for start in (0, 1, 2):
            edited = pipe.sample(
                wanted,
                seed=0,
                prefix=sequence,
                structure_stages=start,
                token_stages=start,
                region=region,
            ).images
            names = judge.predict(edited)
            error = np.square(edited - restored)[:, ~mask].mean()
            print(
                f"{name} | {start} | {np.mean(names == wanted):.1%} | "
                f"{np.mean(names == test.labels[:500]):.1%} | {10 * np.log10(4 / error):.1f}"
            )
            if start == 0:
                shown.append(to_uint8(edited[:12]))
    save_png(FLAGS.out, image_grid(np.concatenate(shown), 12))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "fashion_mnist", "Folder of a model, or a bundled model.")
    flags.DEFINE_string("out", "edits.png", "A picture: held-out images, then each region edited.")
    flags.DEFINE_boolean("reach", False, "Only measure how far a change of the canvas reaches.")
    app.run(main)
