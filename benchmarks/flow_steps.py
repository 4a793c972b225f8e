"""How many steps the structure flow needs.

    python -m benchmarks.flow_steps --workdir=runs/digits --out=runs/digits_steps.jsonl

For every number of steps, solver and time shift, this measures on the model's own data set:

- splits: the share of positions that split as with 200 Euler steps from the same noise, canvas and
  maps (those of --split_images held-out images), over all learned splits;
- FID, precision and recall against the training images in the features of a classifier trained on
  them; the share of samples that it assigns to the requested class; and the spread of a class: the
  mean distance between two of its samples, relative to that between two training images;
- seconds per sample in total, after compilation.

Each point is measured with two seeds, whose difference shows the noise. Every result is written to
--out at once; run the same command again to resume.
"""

import itertools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from nvg_jax.evaluation.features import class_agreement
from nvg_jax.evaluation.image import to_float
from nvg_jax.evaluation.judges import fit_classifier
from nvg_jax.evaluation.report import REFERENCE_IMAGES, features_of, measure
from nvg_jax.evaluation.sets import LabeledImages, load_split
from nvg_jax.pipeline import Pipeline
from nvg_jax.sampling.settings import Settings
from nvg_jax.structure import flow
from nvg_jax.training.distillation import guided_velocity, solution, solve_stages, split_stages
from nvg_jax.visualize import to_uint8

FLAGS = flags.FLAGS
EXACT_STEPS = 200
FIGURES = ("fid", "precision", "recall")


def spread(images: np.ndarray, labels: np.ndarray) -> float:
    """The mean pixel distance between two images of the same class."""
    images, distances = to_float(images), []
    for label in np.unique(labels):
        own = images[labels == label].reshape((labels == label).sum(), -1)
        half = len(own) // 2
        distances.append(np.linalg.norm(own[:half] - own[half : 2 * half], axis=1).mean())
    return float(np.mean(distances))


class Splits:
    """Splits held-out images with a model's flow."""

    def __init__(self, pipe: Pipeline, images: np.ndarray, labels: np.ndarray, settings: Settings):
        self._pipe, self._labels = pipe, jnp.asarray(labels)
        config = pipe.tokenizer.config
        self._sequence = pipe.encode(images)
        self._canvases = pipe.canvases(self._sequence)
        shape = (len(images), config.num_positions, config.num_stages - 1)
        self._noise = jax.random.normal(jax.random.key(0), shape)
        guidance = settings.expand(config.num_stages, config.codebook_size).structure_guidance
        self._guidance = None if set(guidance) == {1.0} else jnp.asarray(guidance)
        self.exact = self(settings.updated(dict(flow_steps=EXACT_STEPS, solver="euler")))

    def __call__(self, settings: Settings) -> np.ndarray:
        """bool (learned splits, images, positions): the half that each position falls into."""
        pipe = self._pipe
        config = pipe.tokenizer.config
        model = pipe.metadata.model.make_generator("structure")
        times = flow.shifted_times(settings.flow_steps, config.num_positions, settings.flow_shift)
        velocity = guided_velocity(model, pipe.params["structure"], self._labels, self._guidance)
        solve = solution(velocity, np.float32(times), settings.solver)
        structure = jnp.asarray(self._sequence.structure)
        solved = jax.jit(lambda *given: solve_stages(solve, *given))
        maps = split_stages(structure, solved(structure, self._canvases, self._noise))
        return np.asarray(maps) % 2 == 1


def main(_):
    logging.set_verbosity(logging.WARNING)  # Orbax logs every file that it reads
    pipe = Pipeline.from_pretrained(FLAGS.workdir)
    data = pipe.metadata.config["data"]
    size = pipe.tokenizer.config.image_size
    train, test = (load_split(data, split, size) for split in ("train", "test"))
    num_classes = pipe.metadata.model.num_classes
    judge = fit_classifier(data["name"], train.images, train.labels, num_classes)
    shuffled = train.select(np.random.default_rng(0).permutation(len(train)))
    reference = features_of(shuffled, judge, keep=REFERENCE_IMAGES)
    real_spread = spread(train.images, train.labels)
    shown = test.images[: FLAGS.split_images], test.labels[: FLAGS.split_images]
    splits = Splits(pipe, *shown, pipe.settings) if FLAGS.split_images else None
    classes = np.arange(FLAGS.num_samples) % pipe.metadata.model.num_classes

    out = Path(FLAGS.out)
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    columns = ("workdir", "num_samples", "solver", "flow_steps", "flow_shift", "seed")
    known = {tuple(result[name] for name in columns): result for result in done}
    print(
        "| solver | shift | steps | splits | FID | precision | recall | agreement | spread | ms |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for solver, shift, steps in itertools.product(FLAGS.solvers, FLAGS.shifts, FLAGS.steps):
        point = dict(solver=solver, flow_steps=int(steps), flow_shift=float(shift))
        shared = (FLAGS.workdir, FLAGS.num_samples, *point.values())
        keys = [(*shared, seed) for seed in range(FLAGS.seeds)]
        share = {}  # of the splits, which do not depend on the seed
        if splits and not all(key in known for key in keys):
            same = splits(pipe.settings.updated(point)) == splits.exact
            share = {"splits": float(same.mean())}
        for seed, key in enumerate(keys):
            if key not in known:
                measured = measure_point(pipe, point, seed, classes, judge, reference)
                measured["spread"] /= real_spread
                known[key] = dict(zip(columns, key)) | share | measured
                with out.open("a") as file:
                    file.write(json.dumps(known[key]) + "\n")
        print(row(point, [known[key] for key in keys]), flush=True)
    if FLAGS.figure:
        draw(list(known.values()), FLAGS.figure)


def row(point: dict, results: list[dict]) -> str:
    """A line of the table: the mean over the seeds and half the difference between them."""

    def cell(name: str, form: str, factor: float = 1) -> str:
        values = [factor * result[name] for result in results]
        half = (max(values) - min(values)) / 2
        return f"{np.mean(values):{form}} ± {half:{form}}"

    cells = [point["solver"], f"{point['flow_shift']:g}", str(point["flow_steps"])]
    cells += [f"{results[0]['splits']:.1%}" if "splits" in results[0] else ""]
    cells += [cell("fid", ".2f")]
    cells += [cell(name, ".3f") for name in ("precision", "recall")]
    cells += [cell("agreement", ".1%"), cell("spread", ".3f")]
    cells += [f"{1000 * min(result['seconds'] for result in results):.1f}"]
    return f"| {' | '.join(cells)} |"


def draw(results: list[dict], path: str):
    """Plots splits and FID against the number of evaluations per split; needs matplotlib."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    curves = {}
    for result in results:
        curves.setdefault((result["solver"], result["flow_shift"]), []).append(result)
    for (solver, shift), points in curves.items():
        steps = sorted({point["flow_steps"] for point in points})
        evaluations = [step * flow.SOLVERS[solver] for step in steps]
        label = solver if shift == 0 else f"{solver}, shift {shift:g}"
        for axis, name in zip(axes, ("splits", "fid")):
            values = [[p[name] for p in points if p["flow_steps"] == step] for step in steps]
            line = axis.plot(evaluations, np.mean(values, axis=1), "o-", ms=3, label=label)
            low, high = np.min(values, axis=1), np.max(values, axis=1)
            axis.fill_between(evaluations, low, high, color=line[0].get_color(), alpha=0.15, lw=0)
    for axis, title in zip(axes, ("positions split as with 200 steps", "FID")):
        axis.set(xscale="log", xlabel="evaluations of the network a split", title=title)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=100)


def measure_point(pipe, point, seed, classes, judge, reference) -> dict[str, float]:
    """The metrics of samples drawn with a point's settings."""
    batches = np.split(classes, range(FLAGS.batch_size, len(classes), FLAGS.batch_size))
    draw = lambda number: (
        pipe.sample(
            batches[number], seed=seed, first_index=number * FLAGS.batch_size, **point
        ).images
    )
    draw(0)  # compiles
    start = time.monotonic()
    images = np.concatenate([draw(number) for number in range(len(batches))])
    seconds = (time.monotonic() - start) / len(classes)
    samples = LabeledImages(to_uint8(images), classes)
    results = measure(samples, judge, reference, names=FIGURES)
    agreement, _ = class_agreement(judge.predict(samples.images), classes)
    return results | {
        "agreement": float(agreement),
        "spread": spread(images, classes),
        "seconds": seconds,
    }


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of a model.", required=True)
    flags.DEFINE_string("out", None, "File of results, a JSON object a line.", required=True)
    flags.DEFINE_string("figure", None, "A picture of the results.")
    flags.DEFINE_list("steps", "1,2,3,4,6,8,12,25,50", "Numbers of steps.")
    flags.DEFINE_list("solvers", "euler,heun,multistep", "Solvers.")
    flags.DEFINE_list("shifts", "0,1,3", "Time shifts; 0 is the published one.")
    flags.DEFINE_integer("seeds", 2, "Seeds of every point.")
    flags.DEFINE_integer("num_samples", 1000, "Samples, cycling through the classes.")
    flags.DEFINE_integer("split_images", 500, "Images whose splits are compared; 0: none.")
    flags.DEFINE_integer("batch_size", 250, "Samples at once.")
    app.run(main)
