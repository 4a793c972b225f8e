"""Does a sample follow the structure of an image? `python -m benchmarks.structure_control`.

For emoji (configs/emoji.py): keeps the maps of the first k stages of held-out pictures, and samples
the same class, another design of the same category, and another category of the same design. For
every k, this prints

- maps: the share of positions whose cluster in the last kept map is the same when the sample is
  encoded again, with the clusters of the two maps matched so that most positions agree;
- silhouette: intersection over union of the sample's silhouette, which is where it is not white,
  and the picture's, which is where it is opaque;
- class: the share of samples that a classifier of the training images takes for the class asked
  for, beside that of samples without a given structure.

"chance" is that of a picture of another class instead of a sample, "ceiling" that of the picture's
reconstruction. --curves draws the table, --figure samples with the maps of the pictures in --show.
The flags of `nvg_jax.sample`, such as --content_guidance, set how samples are drawn.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import app, flags, logging
from matplotlib import figure
from scipy.optimize import linear_sum_assignment

from nvg_jax import cli
from nvg_jax.data import Transform, open_source
from nvg_jax.data.transforms import decode
from nvg_jax.evaluation.judges import ClassJudge, fit_classifier
from nvg_jax.evaluation.sets import load_split
from nvg_jax.pipeline import Pipeline
from nvg_jax.tokenizer import GranularitySequence
from nvg_jax.visualize import labeled_grid, save_png, to_uint8

FLAGS = flags.FLAGS
ROWS, COLUMNS = (2, 4, 6), 3  # of the figure: kept stages, and samples of every kind of class
COLORED = 0.1  # the mean distance of a pixel from white, of 2, from which it is not background


def agreement(found: np.ndarray, wanted: np.ndarray) -> float:
    """The share of positions at which maps (B, L) agree, with the best matching of their labels."""
    shares = []
    for a, b in zip(found, wanted):
        counts = np.zeros((a.max() + 1, b.max() + 1), int)
        np.add.at(counts, (a, b), 1)
        shares.append(counts[linear_sum_assignment(-counts)].sum() / len(a))
    return float(np.mean(shares))


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """The mean intersection over union of silhouettes, bool (..., H, W)."""
    return float(((a & b).sum((-2, -1)) / np.maximum((a | b).sum((-2, -1)), 1)).mean())


def colored(images: np.ndarray) -> np.ndarray:
    """The silhouettes of samples, bool (..., H, W)."""
    return (1 - images).mean(-1) > COLORED


class Pictures:
    """Pictures with transparency.

    Attributes:
        images: float32 (B, H, W, 3) in [-1, 1], on white.
        silhouettes: bool (B, H, W), where they are opaque.
        labels: int (B,).
    """

    def __init__(self, files: list[bytes], labels: list[int], transform: Transform):
        on = lambda color: np.stack([transform(decode(file, color)) for file in files])
        self.images, self.labels = on("white"), np.array(labels)
        self.silhouettes = (self.images - on("black")).mean(-1) < 1


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        stages: how many keep their maps.
        asked: what kind of class is asked for.
        chance, maps, ceiling: agreement of maps, by chance, of the samples, and of reconstructions;
            of the first map that is not whole if nothing is kept.
        silhouette: the overlap of the samples with the pictures.
        share: of the samples that are taken for the class asked for.
    """

    stages: int
    asked: str
    chance: float
    maps: float
    ceiling: float
    silhouette: float
    share: float


def classes_to_ask(pipe: Pipeline, labels: np.ndarray) -> dict[str, np.ndarray]:
    """{what changes: a class for every picture}; of several, the pictures take turns."""
    names = [name.split(" ", 1) for name in pipe.class_names]  # design, category

    def others(label: int, same: int) -> list[int]:
        own = names[label]
        return [
            other
            for other, name in enumerate(names)
            if name[same] == own[same] and name[1 - same] != own[1 - same]
        ]

    def turn(same: int) -> np.ndarray:
        choices = (others(label, same) for label in labels)
        return np.array([found[n % len(found)] for n, found in enumerate(choices)])

    return {"same class": labels, "another design": turn(1), "another category": turn(0)}


def main(_):
    logging.set_verbosity(logging.WARNING)  # Orbax logs every file that it reads
    if FLAGS.curves:
        Path(FLAGS.curves).parent.mkdir(parents=True, exist_ok=True)
    pipe = Pipeline.from_pretrained(FLAGS.workdir, dtype=FLAGS.dtype)
    config, data = pipe.tokenizer.config, cli.data_section(pipe.metadata)
    transform = dataclasses.replace(pipe.metadata.transform, resize=data["resize"])
    source = open_source(
        data["name"], "test", data_dir=data["data_dir"], class_names=pipe.class_names
    )
    records = [source[i] for i in np.linspace(0, len(source) - 1, FLAGS.num_images).astype(int)]
    images, labels = ([record[key] for record in records] for key in ("image", "label"))
    train = load_split(data, "train", config.image_size)
    judge = fit_classifier(data["name"], train.images, train.labels, len(pipe.class_names))
    measure(pipe, judge, Pictures(images, labels, transform))
    if FLAGS.figure:
        files = [Path(data["data_dir"], file) for file in FLAGS.show]
        labels = [pipe.class_id(file.parent.name) for file in files]
        pictures = Pictures([file.read_bytes() for file in files], labels, transform)
        save_png(FLAGS.figure, draw(pipe, pictures, [file.stem for file in files]))


def sample(pipe: Pipeline, labels, sequence: GranularitySequence, stages: int) -> np.ndarray:
    """Samples (B, H, W, 3) of the labels (B,), with the maps of the first stages of a sequence."""
    parts = [slice(i, i + FLAGS.batch_size) for i in range(0, len(labels), FLAGS.batch_size)]
    return np.concatenate([
        pipe.sample(
            labels[part],
            seed=FLAGS.seed,
            first_index=part.start,
            prefix=jax.tree.map(lambda x: x[part], sequence),
            structure_stages=stages,
            **cli.sampling_settings(),
        ).images
        for part in parts
    ])  # fmt: skip


def measure(pipe: Pipeline, judge: ClassJudge, pictures: Pictures):
    """Prints the table; draws it for --curves."""
    asked = classes_to_ask(pipe, pictures.labels)
    sequence = pipe.encode(pictures.images)
    restored = pipe.decode(sequence)
    again = pipe.encode(restored).structure
    other = lambda x: np.roll(x, len(x) // 2, axis=0)  # they are sorted by class
    shapes = pictures.silhouettes
    edges = overlap(other(shapes), shapes), overlap(colored(restored), shapes)
    real = np.mean(judge.predict(pictures.images) == pictures.labels)
    print(f"silhouettes: chance {edges[0]:.3f}, ceiling {edges[1]:.3f}; ", end="")
    print(f"class of real pictures: {real:.1%}")
    print(
        "| kept stages | class asked for | maps: chance | samples | ceiling | silhouette | class |"
    )
    print("|---|---|---|---|---|---|---|")
    table = []
    for stages in (0, *range(2, pipe.tokenizer.config.num_stages)):
        last = max(stages - 1, 1)
        wanted = sequence.structure[:, last]
        chance, ceiling = (agreement(x, wanted) for x in (other(wanted), again[:, last]))
        for name, labels in asked.items():
            images = sample(pipe, labels, sequence, stages)
            maps = agreement(pipe.encode(images).structure[:, last], wanted)
            share = float(np.mean(judge.predict(images) == labels))
            silhouette = overlap(colored(images), shapes)
            table.append(Row(stages, name, chance, maps, ceiling, silhouette, share))
            print(
                f"| {stages} | {name} | {chance:.1%} | {maps:.1%} | {ceiling:.1%} | "
                f"{silhouette:.3f} | {share:.1%} |",
                flush=True,
            )
    if FLAGS.curves:
        curves(table, edges, float(real)).savefig(FLAGS.curves, dpi=120)


def curves(table: list[Row], edges: tuple[float, float], real: float) -> figure.Figure:
    """The table over the kept stages, with chance and ceiling.

    Args:
        edges: chance and ceiling of the silhouettes.
        real: the share of real pictures that are taken for their class.
    """
    canvas = figure.Figure(figsize=(10, 3.4), layout="constrained")
    maps, silhouettes, classes = canvas.subplots(1, 3)
    for asked in dict.fromkeys(row.asked for row in table):
        rows = [row for row in table if row.asked == asked]
        stages, kept = [row.stages for row in rows], [row for row in rows if row.stages]
        maps.plot([row.stages for row in kept], [row.maps for row in kept], "o-")
        silhouettes.plot(stages, [row.silhouette for row in rows], "o-")
        classes.plot(stages, [row.share for row in rows], "o-", label=asked)
    bounds = {row.stages: (row.chance, row.ceiling) for row in table if row.stages}
    looks = ((":", "a picture of another class"), ("--", "reconstruction"))
    for (style, label), of_maps, edge in zip(looks, zip(*bounds.values()), edges):
        maps.plot(list(bounds), of_maps, style, color="gray", zorder=0)
        silhouettes.axhline(edge, color="gray", linestyle=style, zorder=0, label=label)
    classes.axhline(real, color="gray", linestyle="-.", zorder=0, label="real pictures")
    maps.set_title("positions with the given cluster", fontsize="medium")
    silhouettes.set_title("overlap of silhouettes", fontsize="medium")
    classes.set_title("taken for the class asked for", fontsize="medium")
    for axis in (maps, silhouettes, classes):
        axis.set_xlabel("stages whose maps are kept")
        axis.set_ylim(0, None if axis is classes else 1)
        axis.grid(alpha=0.3)
    silhouettes.legend(fontsize="small", loc="lower right")
    classes.legend(fontsize="small")
    return canvas


def draw(pipe: Pipeline, pictures: Pictures, names: list[str]) -> np.ndarray:
    """A row for every picture and number of stages, `COLUMNS` samples of every kind of class."""
    asked = classes_to_ask(pipe, np.repeat(pictures.labels, COLUMNS))
    sequence = pipe.encode(pictures.images)
    columns = ["image"] + [name for name in asked for _ in range(COLUMNS)]
    repeated = jax.tree.map(lambda x: np.repeat(x, COLUMNS, axis=0), sequence)
    found = np.array([
        [sample(pipe, labels, repeated, stages) for labels in asked.values()] for stages in ROWS
    ])  # fmt: skip
    rows, tiles = [], []
    for number, name in enumerate(names):
        for stages, images in zip(ROWS, found[:, :, COLUMNS * number : COLUMNS * (number + 1)]):
            own = images.reshape(-1, *images.shape[2:])
            tiles.append(to_uint8(np.concatenate([pictures.images[number][None], own])))
            rows.append(f"{name}, {stages} stages")
    return labeled_grid(tiles, rows, columns)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of a model of emoji.", required=True)
    cli.define_data_flags()
    flags.DEFINE_integer("num_images", 256, "Held-out pictures, evenly spaced.")
    flags.DEFINE_integer("batch_size", 64, "Samples at once.")
    cli.define_sampling_flags()
    flags.DEFINE_string("curves", None, "A picture of the table.")
    flags.DEFINE_string("figure", None, "A picture of samples.")
    flags.DEFINE_list(
        "show",
        "train/noto animal-bird/flamingo.png,train/noto cat-face/smiley_cat.png,"
        "train/noto transport-ground/car.png,train/noto place-building/house.png",
        "Pictures of --figure, in the folder of emoji.",
    )
    flags.DEFINE_integer("seed", 0, "Seed of the samples.")
    app.run(main)
