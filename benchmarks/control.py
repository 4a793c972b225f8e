"""How well samples follow user input: `python -m benchmarks.control`.

Uses the bundled Fashion-MNIST model or another model of the same data (`--workdir`), and needs the
data set (docs/data.md). First, 50 samples of each class follow a ready-made map; they are encoded
again, and their own first map is compared with the given one. A map and its inverse count as equal.
Chance is the same measure for free samples. Then held-out images are edited: a region is resampled
for another class, and a classifier trained on real images classifies the result.
"""

import numpy as np
from absl import app, flags, logging

from nvg_jax.evaluation.classifiers import train_classifier
from nvg_jax.jobs.evaluation import load_split
from nvg_jax.pipeline import Pipeline
from nvg_jax.sampling import control
from nvg_jax.tokenizer import GranularitySequence
from nvg_jax.visualize import image_grid, save_png

FLAGS = flags.FLAGS
DATA = {"name": "fashion_mnist", "data_dir": "", "resize": 32}
BINARY = ("left_right", "top_bottom", "circle_center", "circle_left", "rectangle")


def agreement(pipe: Pipeline, images: np.ndarray, wanted: np.ndarray) -> float:
    same = (pipe.encode(np.clip(images, -1, 1)).structure[:, 1] == wanted).mean(1)
    return np.maximum(same, 1 - same).mean()


def main(_):
    logging.set_verbosity(logging.WARNING)  # Orbax logs every file that it reads
    pipe = Pipeline.from_pretrained(FLAGS.workdir)
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
    judge = train_classifier(*train, 10)
    images = test.images[:500]
    wanted = (test.labels[:500] + 1 + np.arange(500) % 9) % 10
    sequence = pipe.encode(images)
    restored = pipe.decode(sequence)
    rows, columns = np.mgrid[:32, :32]
    print("edited region | from stage | named as the new class | as the old | PSNR outside, dB")
    shown = [images[:12]]
    for name, mask in (
        ("middle half", (columns >= 8) & (columns < 24)),
        ("right half", columns >= 16),
        ("all but the upper left quarter", (columns >= 16) | (rows >= 16)),
    ):
        region = control.region_of_mask(mask, latent)
        for start in (0, 1, 2):
            given = dict(prefix=sequence, structure_stages=start, token_stages=start, region=region)
            edited = pipe.sample(wanted, seed=0, **given).images
            names = judge.predict(edited)
            error = np.square(edited - restored)[:, ~mask].mean()
            print(
                f"{name} | {start} | {np.mean(names == wanted):.1%} | "
                f"{np.mean(names == test.labels[:500]):.1%} | {10 * np.log10(4 / error):.1f}"
            )
            if start == 0:
                shown.append(edited[:12])
    save_png(FLAGS.out, image_grid(np.concatenate(shown), 12))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "fashion_mnist", "Folder of a model, or a bundled model.")
    flags.DEFINE_string("out", "edits.png", "A picture: held-out images, then each region edited.")
    app.run(main)
