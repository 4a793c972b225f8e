"""Evaluation: `python -m nvg_jax.evaluate --workdir=runs/digits --num_samples=1000`.

Measures the reconstruction of held-out images, how often a classifier trained on real images names
samples as the requested class, how far samples are from the training images, and (except for
digits) a Frechet distance in the classifier's features. Writes metrics.json, samples.png,
stages.png and reconstructions.png.
"""

import json
from pathlib import Path

from absl import flags

from nvg_jax import cli

FLAGS = flags.FLAGS


def main(_):
    settings = cli.sampling_settings()
    from nvg_jax.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(FLAGS.workdir)
    data = cli.data_section(pipeline.metadata.config)
    from nvg_jax.jobs.evaluation import evaluate
    from nvg_jax.runtime.processes import barrier, is_main

    out = Path(FLAGS.out or Path(FLAGS.workdir) / "evaluation")
    out.mkdir(parents=True, exist_ok=True)
    results = evaluate(
        pipeline, data, out, FLAGS.num_samples, FLAGS.seed, FLAGS.batch_size, **settings
    )
    if is_main():
        print(json.dumps(results, indent=1))
        print(f"metrics.json and pictures: {out}")
    barrier("the metrics are written")


if __name__ == "__main__":
    cli.define_model_flags()
    cli.define_sampling_flags()
    cli.define_data_flags()
    flags.DEFINE_string("out", None, "Folder for the results; by default WORKDIR/evaluation.")
    flags.DEFINE_integer("num_samples", 1000, "Samples, cycling through the classes.", 10)
    flags.mark_flags_as_required(["workdir"])
    cli.main(main)
