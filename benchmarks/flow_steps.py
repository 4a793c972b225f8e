"""What the structure flow must compute: quality over evaluations of the network.

    python -m benchmarks.flow_steps --workdir=runs/digits --out=runs/digits_steps.jsonl \\
        --sweep="flow_steps=25;8;4;2 structure_solves=;0,1;0"

For every combination of settings, this measures, on the model's own data set or
that of --data_name:

- evaluations: of the structure generator, for one image;
- splits: the share of positions that split as with 200 Euler steps from the same noise, canvas and
  maps (those of --split_images held-out images), over all learned splits; without restarts;
- FID, precision and recall against the training images in the features of a classifier trained on
  them; the share of samples that it assigns to the requested class; and the spread of a class: the
  mean distance between two of its samples, relative to that between two training images;
- seconds per sample in total, after compilation.

Each point is measured with two seeds, whose difference shows the noise. Every result is written to
--out at once; run the same command again to resume.
"""

import json
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from benchmarks.timed import resumed
from nvg_jax import cli
from nvg_jax.evaluation.features import class_agreement
from nvg_jax.evaluation.image import to_float
from nvg_jax.evaluation.judges import fit_classifier
from nvg_jax.evaluation.report import REFERENCE_IMAGES, features_of, measure
from nvg_jax.evaluation.sets import LabeledImages, load_split
from nvg_jax.jobs.tuning import evaluations
from nvg_jax.pipeline import Pipeline
from nvg_jax.sampling.settings import Settings, parse_sweep, text_of
from nvg_jax.structure import flow
from nvg_jax.training.distillation import guided_velocity, solution, solve_stages, split_stages
from nvg_jax.visualize import to_uint8

FLAGS = flags.FLAGS
EXACT_STEPS = 200
METRICS = ("fid", "precision", "recall")


def spread(images: np.ndarray, labels: np.ndarray) -> float:
    """The mean pixel distance between two images of the same class; NaN without two of one."""
    images, distances = to_float(images), []
    for label in np.unique(labels):
        own = images[labels == label].reshape((labels == label).sum(), -1)
        if half := len(own) // 2:
            distances.append(np.linalg.norm(own[:half] - own[half : 2 * half], axis=1).mean())
    return float(np.mean(distances)) if distances else math.nan


class Splits:
    """Splits held-out images with a model's flow."""

    def __init__(self, pipe: Pipeline, images: np.ndarray, labels: np.ndarray, settings: Settings):
        self._pipe, self._labels = pipe, jnp.asarray(labels)
        config = pipe.tokenizer.config
        self._sequence = pipe.encode(images)
        self._canvases = pipe.canvases(self._sequence)
        shape = (len(images), config.num_positions, config.num_stages - 1)
        self._noise = jax.random.normal(jax.random.key(0), shape)
        expanded = settings.expand(config.num_stages, config.codebook_size)
        guidance = expanded.per_stage("structure_guidance")
        self._guidance = None if set(guidance) == {1.0} else jnp.asarray(guidance)
        exact = dict(flow_steps=EXACT_STEPS, solver="euler", structure_solves=())
        self.exact = self(settings.updated(exact))

    def __call__(self, settings: Settings) -> np.ndarray:
        """bool (learned splits, images, positions): the half that each position falls into."""
        pipe = self._pipe
        config = pipe.tokenizer.config
        model = pipe.metadata.model.make_generator("structure")
        times = flow.shifted_times(settings.flow_steps, config.num_positions, settings.flow_shift)
        velocity = guided_velocity(model, pipe.params["structure"], self._labels, self._guidance)
        solve = solution(velocity, times.astype(np.float32), settings.solver)
        structure = jnp.asarray(self._sequence.structure)
        solved = jax.jit(lambda *given: solve_stages(solve, *given))
        solutions = solved(structure, self._canvases, self._noise)
        solves = {0, *(settings.structure_solves or range(len(solutions)))}
        used = [max(s for s in solves if s <= split) for split in range(len(solutions))]
        maps = split_stages(structure, solutions[np.array(used)])
        return np.asarray(maps) % 2 == 1


def main(_):
    logging.set_verbosity(logging.WARNING)  # Orbax logs every file that it reads
    pipe = Pipeline.from_pretrained(FLAGS.workdir)
    data = cli.data_section(pipe.metadata)
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
    out.parent.mkdir(parents=True, exist_ok=True)
    # Without those of other weights in this folder: the run may have been trained further.
    is_old = lambda row: row["workdir"] == FLAGS.workdir and row.get("weights") != pipe.fingerprint
    done = [row for row in resumed(out) if not is_old(row)]
    points = parse_sweep(FLAGS.sweep)
    of = lambda result: (result["num_samples"], result["seed"], tuple(map(tuple, result["point"])))
    known = {of(result): result for result in done if result["workdir"] == FLAGS.workdir}
    print(f"| {' | '.join(points[0])} | evaluations | splits | FID | precision | recall |", end="")
    print(" agreement | spread | ms |\n" + "|---" * (len(points[0]) + 8) + "|")
    for point in points:
        named = [(name, text_of(value)) for name, value in point.items()]
        shared = {"workdir": FLAGS.workdir, "weights": pipe.fingerprint, "point": named}
        shared["num_samples"] = FLAGS.num_samples
        rows = [shared | {"seed": seed} for seed in range(FLAGS.seeds)]
        shared["evaluations"] = evaluations(pipe, pipe.settings.updated(point))
        restarts = point.get("flow_restart", 1) < 1
        if splits and not restarts and not all(of(result) in known for result in rows):
            same = splits(pipe.settings.updated(point)) == splits.exact
            shared["splits"] = float(same.mean())  # does not depend on the seed
        for seed, result in enumerate(rows):
            if of(result) not in known:
                measured = measure_point(pipe, point, seed, classes, judge, reference)
                measured["spread"] /= real_spread
                known[of(result)] = shared | result | measured
                done.append(known[of(result)])
                with out.open("a") as file:
                    file.write(json.dumps(known[of(result)]) + "\n")
        print(row([known[of(result)] for result in rows]), flush=True)
    if FLAGS.figure:
        draw(done, FLAGS.figure)


def row(results: list[dict]) -> str:
    """A line of the table: the mean over the seeds and half the difference between them."""

    def cell(name: str, form: str, factor: float = 1) -> str:
        values = [factor * result[name] for result in results]
        half = (max(values) - min(values)) / 2
        return f"{np.mean(values):{form}} ± {half:{form}}"

    first = results[0]
    cells = [value for _, value in first["point"]] + [str(first["evaluations"])]
    cells += [f"{first['splits']:.1%}" if "splits" in first else ""]
    cells += [cell("fid", ".2f")]
    cells += [cell(name, ".3f") for name in ("precision", "recall")]
    cells += [cell("agreement", ".1%"), cell("spread", ".3f")]
    cells += [f"{1000 * min(result['seconds'] for result in results):.1f}"]
    return f"| {' | '.join(cells)} |"


def draw(results: list[dict], path: str):
    """Plots FID against the evaluations for an image, a curve for what differs beside the steps.

    Results of several models have curves of their own.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    curves, folders = {}, {result["workdir"] for result in results}
    for result in results:
        label = [Path(result["workdir"]).name] if len(folders) > 1 else []
        label += [
            f"{name} {value}" for name, value in result["point"] if name != "flow_steps" and value
        ]
        curve = curves.setdefault(", ".join(label), {})
        curve.setdefault(result["evaluations"], []).append(result["fid"])
    for label, curve in curves.items():
        counts = sorted(curve)
        values = [curve[count] for count in counts]
        mean = np.mean(values, axis=1)
        reach = mean - np.min(values, axis=1), np.max(values, axis=1) - mean
        axis.errorbar(counts, mean, reach, fmt="o-", ms=3, capsize=2, lw=1, label=label)
    axis.set(
        xscale="log", xlabel="evaluations of the structure generator for an image", title="FID"
    )
    axis.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=100)


def measure_point(pipe, point, seed, classes, judge, reference) -> dict[str, float]:
    """The metrics of samples drawn with a point's settings."""
    batches = np.split(classes, range(FLAGS.batch_size, len(classes), FLAGS.batch_size))
    draw = lambda number: (
        pipe.sample(
            batches[number], seed=seed, first_index=number * FLAGS.batch_size, **point
        ).images
    )
    for number in {0, len(batches) - 1}:  # compiles; the last batch may be smaller
        draw(number)
    start = time.monotonic()
    images = np.concatenate([draw(number) for number in range(len(batches))])
    seconds = (time.monotonic() - start) / len(classes)
    samples = LabeledImages(to_uint8(images), classes)
    results = measure(samples, judge, reference, names=METRICS)
    agreement, _ = class_agreement(judge.predict(samples.images), classes)
    return results | {
        "agreement": float(agreement),
        "spread": spread(images, classes),
        "seconds": seconds,
    }


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of a model.", required=True)
    flags.DEFINE_string("out", None, "File of results, a JSON object a line.", required=True)
    cli.define_data_flags()
    flags.DEFINE_string("figure", None, "A picture of all results in the file, of any model.")
    flags.DEFINE_string("sweep", "flow_steps=1;2;4;8;25", "As evaluate's --sweep.")
    flags.DEFINE_integer("seeds", 2, "Seeds of every point.")
    flags.DEFINE_integer("num_samples", 1000, "Samples, cycling through the classes.")
    flags.DEFINE_integer("split_images", 500, "Images whose splits are compared; 0: none.")
    flags.DEFINE_integer("batch_size", 250, "Samples at once.")
    app.run(main)
