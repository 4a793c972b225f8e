"""Evaluates a model: `python -m nvg_jax.evaluate --workdir=runs/digits --num_samples=1000`.

Measures the reconstruction of held-out images and the quality of samples: how often a classifier
fitted on real images recognizes the class that was asked for, their distance to the training
images, and a Frechet distance in the classifier's features. Writes metrics.json,
reconstructions.png, samples.png and stages.png. Several processes share the reconstruction and the
sampling; process 0 measures and writes.
"""

import functools
import json
from pathlib import Path
from typing import Any

from absl import flags

from nvg_jax import cli
from nvg_jax.jobs.flags import define_flags, settings_from_flags
from nvg_jax.pipeline import Pipeline
from nvg_jax.runtime import processes

FLAGS = flags.FLAGS


def data_from_flags(pipeline: Pipeline) -> dict[str, Any]:
    """The data set given as flags, else the one that the model was trained on."""
    if FLAGS.data_name:
        return {"name": FLAGS.data_name, "data_dir": FLAGS.data_dir, "resize": FLAGS.resize}
    if "config" in pipeline.meta:
        return pipeline.meta["config"]["data"]
    raise ValueError(
        "This folder does not say which data set it was trained on (converted weights do not). "
        "Give --data_name, for example tfds:imagenet2012, and --data_dir."
    )


def main(_):
    settings = settings_from_flags()
    pipeline = Pipeline.from_pretrained(FLAGS.workdir)
    data = data_from_flags(pipeline)
    out = Path(FLAGS.out or Path(FLAGS.workdir) / "evaluation")
    out.mkdir(parents=True, exist_ok=True)

    # Slow to import.
    from nvg_jax.evaluation.classifiers import DigitClassifier, train_classifier
    from nvg_jax.jobs.evaluation import evaluate

    fit_classifier = functools.partial(train_classifier, num_classes=len(pipeline.class_names))
    digits = data["name"] == "digits"
    results = evaluate(
        pipeline,
        data,
        out,
        fit_classifier=DigitClassifier if digits else fit_classifier,
        frechet=not digits,  # they have only 300 test images
        num_samples=FLAGS.num_samples,
        seed=FLAGS.seed,
        batch_size=FLAGS.batch_size,
        settings=settings,
    )
    if results is not None:
        print(json.dumps(results, indent=1))
        print(f"metrics.json and images: {out}")
    processes.barrier("the metrics are written")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of a run, or an exported or converted model.")
    flags.DEFINE_string("out", None, "Folder to write to; WORKDIR/evaluation if not given.")
    flags.DEFINE_integer("num_samples", 1000, "Samples, one of each class in turn.", lower_bound=10)
    flags.DEFINE_integer("batch_size", 64, "Samples a process makes at a time.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of all randomness.")
    flags.DEFINE_string("data_name", None, "Data set, if not the one the model was trained on.")
    flags.DEFINE_string("data_dir", "", "Folder of --data_name.")
    flags.DEFINE_integer("resize", 0, "Short side before the crop; 0: image size * 288 / 256.")
    define_flags()
    flags.mark_flags_as_required(["workdir"])
    cli.run(main)
