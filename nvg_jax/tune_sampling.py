"""Finds the cheapest structure flow that samples as well as the model's own settings.

    python -m nvg_jax.tune_sampling --workdir=runs/digits --out=models/digits

Tries fewer steps and fewer stages at which the flow is solved (docs/few_steps.md), cheapest first,
until the mean FID over --seeds seeds is no worse than the worst of the model's own settings. --out
is a new export of the model that recommends what was found.
"""

import functools

from absl import flags
from etils import epy

from nvg_jax import cli
from nvg_jax.errors import UserError, comes_with
from nvg_jax.runtime.processes import is_main
from nvg_jax.runtime.storage import make_folder, storage_path

with epy.lazy_imports(error_callback=comes_with("train")):
    from nvg_jax import metadata, pipeline
    from nvg_jax.evaluation import judges, report, sets
    from nvg_jax.jobs import classification, sampling_runs, tuning

FLAGS = flags.FLAGS


def main(_):
    out = storage_path(FLAGS.out)
    metadata.check_export(out)
    pipe = pipeline.Pipeline.from_pretrained(FLAGS.workdir)
    pipe.check_can_sample()
    points = tuning.candidates(pipe)
    own = tuning.Point(tuning.evaluations(pipe, pipe.settings), {})
    if not points:
        raise UserError("This model's own settings are already the cheapest that can be tried.")
    data = cli.data_section(pipe.metadata)
    size = pipe.tokenizer.config.image_size
    classification.check_classes(pipe, sets.Split(data, "train", size).source)
    train = sets.load_split(data, "train", size)
    count = pipe.metadata.model.num_classes
    judge = judges.fit_classifier(data["name"], train.images, train.labels, count)
    reference = report.features_of(train, judge, keep=0)
    features = len(reference.pool_mean)
    if report.too_few({"images": FLAGS.num_samples, "features": features}):
        raise UserError(
            f"FID needs more samples than the judge has features, {features}, to compare settings; "
            f"give a larger --num_samples than {FLAGS.num_samples}."
        )
    make_folder(out)  # fails now, not after the measurements
    job = sampling_runs.SamplingJob.cycling(
        pipe, FLAGS.num_samples, FLAGS.batch_size, FLAGS.seed, {}
    )
    fids = functools.partial(tuning.measure_fids, job, judge, reference, FLAGS.seeds)
    best, lines = tuning.tune(points, own, fids)
    if is_main():
        print("\n".join(lines))
        print(f"{own.evaluations / best.evaluations:.1f} times fewer evaluations: {best}")
    if best is not own:
        pipe.settings = pipe.settings.updated(best.settings)
    pipe.save_pretrained(out)
    if is_main():
        print(f"written: {FLAGS.out}")


if __name__ == "__main__":
    cli.define_model_flags()
    cli.define_data_flags()
    flags.DEFINE_string("out", None, "Folder for the model with its new settings.")
    flags.DEFINE_integer("num_samples", 1000, "Samples for each seed.", 10)
    flags.DEFINE_integer("seeds", 3, "Seeds; their FIDs show how much is noise.", 2)
    flags.mark_flags_as_required(["workdir", "out"])
    cli.main(main)
