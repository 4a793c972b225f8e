"""Evaluates samples and models. There are four uses, each for one table:

    python -m nvg_jax.evaluate --samples=fid50k.npz --reference=VIRTUAL_imagenet256_labeled.npz
    python -m nvg_jax.evaluate --workdir=runs/d16 --num_samples=50000 --reference=train
    python -m nvg_jax.evaluate --workdir=runs/d16 --reconstruction
    python -m nvg_jax.evaluate --workdir=runs/digits --num_samples=1000

The first two compute FID, sFID, Inception Score, precision and recall from Inception features, for
a file or for samples drawn on the fly. The third computes rFID, LPIPS, PSNR, SSIM and codebook
usage of the tokenizer. The last needs no downloaded network: a classifier trained on the data set
is the judge (--judge=classifier). docs/evaluation.md has the details.
"""

import json
from pathlib import Path

from absl import flags

from nvg_jax import cli
from nvg_jax.errors import UserError

FLAGS = flags.FLAGS


def main(_):
    settings = cli.sampling_settings()
    judge = FLAGS.judge or ("inception" if FLAGS.reference else "classifier")
    check_flags(judge)
    from nvg_jax.runtime.processes import barrier, is_main

    results, table = evaluate_samples() if FLAGS.samples else evaluate_model(judge, settings)
    if is_main():
        print(table or json.dumps(results, indent=1))
        print(f"metrics.json: {out_folder()}")
    barrier("the metrics are written")


def check_flags(judge: str):
    """Raises UserError for flags that contradict each other."""
    if bool(FLAGS.samples) == bool(FLAGS.workdir):
        raise UserError("Give either --samples=FILE.npz, or --workdir of a model.")
    if FLAGS.samples and not FLAGS.reference:
        raise UserError("--samples needs --reference=FILE.npz to compare with.")
    if FLAGS.samples and (FLAGS.reconstruction or FLAGS.sweep or judge == "classifier"):
        raise UserError(
            "--reconstruction, --sweep and --judge=classifier need a model; give --workdir."
        )
    if judge == "inception" and not (FLAGS.reference or FLAGS.reconstruction):
        raise UserError(
            "--judge=inception needs --reference (train, test or an .npz file) for samples, or "
            "--reconstruction."
        )
    if FLAGS.sweep and not FLAGS.reference:
        raise UserError("--sweep needs --reference (train, test or an .npz file).")


def out_folder() -> Path:
    default = FLAGS.workdir and Path(FLAGS.workdir) / "evaluation"
    return Path(FLAGS.out or default or Path(FLAGS.samples).with_suffix(".evaluation"))


def evaluate_samples():
    """(results, table) for a file of samples."""
    from nvg_jax.jobs import comparison, features

    images = features.Archive(FLAGS.samples, FLAGS.batch_size)
    reference = comparison.open_reference(FLAGS.reference, FLAGS.batch_size)
    judge = features.Inception()
    comparison.check_sizes(images, reference)
    known = features.reference_features(reference, judge)
    facts = {"samples": FLAGS.samples, "reference": FLAGS.reference}
    results = comparison.compare(images, known, judge, out_folder(), facts)
    return results, results and comparison.table([results])


def evaluate_model(judge: str, settings):
    """(results, table or None) for a model."""
    from nvg_jax.data.sources import SPLITS
    from nvg_jax.pipeline import Pipeline
    from nvg_jax.runtime.files import make_folder

    pipeline = Pipeline.from_pretrained(FLAGS.workdir, FLAGS.dtype)
    needs_data = FLAGS.reconstruction or judge == "classifier" or FLAGS.reference in SPLITS
    data = cli.data_section(pipeline.metadata.config) if needs_data else None
    out = out_folder()
    make_folder(out)
    if FLAGS.reconstruction:
        from nvg_jax.jobs import comparison

        size = pipeline.tokenizer.config.image_size
        images = comparison.split_images(data, "test", size, FLAGS.batch_size)
        return comparison.reconstruction(pipeline, images, out), None
    if judge == "classifier":
        from nvg_jax.jobs.evaluation import evaluate

        return evaluate(
            pipeline, data, out, FLAGS.num_samples, FLAGS.seed, FLAGS.batch_size, **settings
        ), None
    return compare_samples(pipeline, data, out, settings)


def compare_samples(pipeline, data, out: Path, settings):
    """(results, table) for samples that are drawn here."""
    from nvg_jax.jobs import comparison, features
    from nvg_jax.jobs.sampling import SamplingJob

    pipeline.check_can_sample()
    classes = [index % pipeline.metadata.model.num_classes for index in range(FLAGS.num_samples)]
    size = min(FLAGS.batch_size, FLAGS.num_samples)
    job = SamplingJob(pipeline, classes, 1, size, FLAGS.seed, settings)
    points = comparison.parse_sweep(FLAGS.sweep) if FLAGS.sweep else []
    for point in points or [{}]:  # raises before anything is computed
        comparison.at_point(job, point).expanded_settings()
    reference = comparison.open_reference(FLAGS.reference, FLAGS.batch_size, job.image_size, data)
    comparison.check_sizes(job, reference)
    judge = features.Inception()
    known = features.reference_features(reference, judge)
    if points:
        results = comparison.sweep(job, points, known, judge, out)
        return results, results and comparison.table(results)
    facts = {"reference": FLAGS.reference, **comparison.sampling_facts(job)}
    results = comparison.compare(job, known, judge, out, facts)
    return results, results and comparison.table([results])


if __name__ == "__main__":
    cli.define_model_flags()
    cli.define_sampling_flags()
    cli.define_data_flags()
    flags.DEFINE_string("out", None, "Folder for the results; by default WORKDIR/evaluation.")
    flags.DEFINE_integer("num_samples", 1000, "Samples, cycling through the classes.", 10)
    flags.DEFINE_string("samples", None, "An .npz file of samples to compare; needs no model.")
    flags.DEFINE_string(
        "reference", None, "What to compare with: an .npz file, or the data set's train or test."
    )
    flags.DEFINE_enum(
        "judge",
        None,
        ["inception", "classifier"],
        "The network whose features are compared; inception if there is a --reference.",
    )
    flags.DEFINE_boolean("reconstruction", False, "Evaluate the tokenizer alone.")
    flags.DEFINE_string(
        "sweep", None, 'Settings to try: "content_guidance=1,3.5;1,4.5 top_p=1,0.5;1,0.7".'
    )
    cli.main(main)
