"""Evaluates samples and models. There are four uses, each for one table:

    python -m nvg_jax.evaluate --samples=fid50k.npz --reference=VIRTUAL_imagenet256_labeled.npz
    python -m nvg_jax.evaluate --workdir=runs/d16 --num_samples=50000 --reference=train
    python -m nvg_jax.evaluate --workdir=runs/d16 --reconstruction
    python -m nvg_jax.evaluate --workdir=runs/digits --num_samples=1000

The first two compute FID, sFID, Inception Score, precision and recall from Inception features (or
EfficientNet's: --judge=efficientnet), for a file or for samples drawn on the fly. The third
computes rFID, LPIPS, PSNR, SSIM and codebook usage of the tokenizer. The last needs no downloaded
network: a classifier trained on the data set is the judge (--judge=classifier). docs/evaluation.md
has the details.
"""

import logging

from absl import flags
from etils import epath, epy

from nvg_jax import cli
from nvg_jax.data.sources import SPLITS
from nvg_jax.errors import UserError, comes_with
from nvg_jax.runtime import interrupts
from nvg_jax.runtime.processes import barrier, is_main
from nvg_jax.runtime.storage import make_folder, storage_path
from nvg_jax.sampling.settings import Settings, parse_sweep

with epy.lazy_imports(error_callback=comes_with("train")):  # slow
    from nvg_jax import bundled, hub, pipeline
    from nvg_jax.evaluation import judges, report, sets
    from nvg_jax.jobs import classification, reconstruction, sampling_runs

FLAGS = flags.FLAGS
logger = logging.getLogger("nvg_jax")
OF_SAMPLES = {"num_samples", "seed", *Settings.specs()}  # flags that say how samples are drawn


def main(_):
    settings = cli.sampling_settings()
    published = FLAGS.reference or FLAGS.reconstruction
    judge = FLAGS.judge or ("inception" if published else "classifier")
    check_flags(judge)
    if judge in judges.FITTED:
        interrupts.kept = ""
    table = evaluate_samples(judge) if FLAGS.samples else evaluate_model(judge, settings)
    if is_main():
        print(table)
        print(metrics_file())
    barrier("the metrics are written")


def check_flags(judge: str):
    """Raises UserError for flags that contradict each other."""
    if bool(FLAGS.samples) == bool(FLAGS.workdir):
        raise UserError("Give either --samples=FILE.npz, or --workdir of a model.")
    if FLAGS.samples and not FLAGS.reference:
        raise UserError("--samples needs --reference=FILE.npz to compare with.")
    fitted = judge in judges.FITTED
    if FLAGS.samples and (FLAGS.reconstruction or FLAGS.sweep or fitted):
        raise UserError(
            "--reconstruction, --sweep and --judge=classifier need a model; give --workdir."
        )
    if not fitted and not (FLAGS.reference or FLAGS.reconstruction):
        raise UserError(
            f"--judge={judge} needs --reference (train, test or an .npz file) for samples, or "
            "--reconstruction."
        )
    if fitted and (FLAGS.reference or FLAGS.sweep or FLAGS.reconstruction):
        raise UserError(
            f"--judge={judge} compares with the images of its data set, and reconstructions too; "
            "leave out --reference, --sweep and --reconstruction, or choose --judge=inception or "
            "efficientnet."
        )
    if FLAGS.reconstruction and (FLAGS.reference or FLAGS.sweep):
        raise UserError(
            "--reconstruction compares with the data set's own images and takes no settings; leave "
            "out --reference and --sweep."
        )
    if FLAGS.sweep and not FLAGS.reference:
        raise UserError("--sweep needs --reference (train, test or an .npz file).")
    unused = set()  # what would have no effect
    if FLAGS.samples or FLAGS.reconstruction:
        unused |= OF_SAMPLES
    if FLAGS.samples:
        unused.add("dtype")
    if FLAGS.reference and FLAGS.reference not in SPLITS:
        unused |= {"data_name", "data_dir", "resize"}
    modes = ("samples", "reconstruction", "reference")
    check_unused(unused, next((f"--{name}" for name in modes if FLAGS[name].value), ""))


def check_unused(names: set[str], why: str):
    """Raises UserError if one of these flags is given, which would have no effect with `why`."""
    if given := sorted(f"--{name}" for name in names if FLAGS[name].present):
        raise UserError(f"{', '.join(given)}: no effect with {why}; leave out.")


def out_folder() -> epath.Path:
    """The folder for the results: by default in the model's folder, or beside the samples.

    The uses have folders of their own, so that none replaces the results of another.
    """
    if FLAGS.out:
        return storage_path(FLAGS.out)
    if FLAGS.samples:
        return storage_path(FLAGS.samples).with_suffix(".evaluation")
    name = FLAGS.workdir.removeprefix(hub.PREFIX)
    workdir = storage_path(name)
    is_own = bundled.find(FLAGS.workdir) == workdir
    folder = workdir / "evaluation" if is_own else storage_path("runs/evaluation") / name
    uses = ("reconstruction", "sweep", "reference")
    return folder / next((use for use in uses if getattr(FLAGS, use)), "classifier")


def metrics_file() -> epath.Path:
    """The file of the metrics; those of each name of a reference have a file of their own."""
    reference = FLAGS.reference and epath.Path(FLAGS.reference).stem
    return out_folder() / (f"metrics_{reference}.json" if reference else "metrics.json")


def evaluate_samples(judge: str) -> str:
    """The table for a file of samples, on process 0; so are the next two."""
    samples = sets.Archive(FLAGS.samples, FLAGS.batch_size)
    reference = sets.open_reference(FLAGS.reference, FLAGS.batch_size)
    return compare(judge, [({}, samples, {"samples": FLAGS.samples})], reference)


def evaluate_model(judge: str, settings) -> str:
    """The table for a model."""
    pipe = pipeline.Pipeline.from_pretrained(FLAGS.workdir, FLAGS.dtype)
    fitted = judge in judges.FITTED
    needs_data = FLAGS.reconstruction or fitted or FLAGS.reference in SPLITS
    data = cli.data_section(pipe.metadata) if needs_data else None
    if FLAGS.reconstruction:
        assert data is not None
        images = sets.Split(data, "test", pipe.tokenizer.config.image_size, FLAGS.batch_size)
        results = reconstruction.report(pipe, images, out_folder(), judge)
        return reconstruction.table(results) if results else ""
    if fitted:
        assert data is not None
        if not pipe.can_sample:
            check_unused(OF_SAMPLES, "a tokenizer alone")
        job = sampling_job(pipe, settings) if pipe.can_sample else None
        results = classification.report(pipe, data, job, out_folder(), FLAGS.batch_size)
        return classification.table(results, len(pipe.class_names)) if results else ""
    pipe.check_can_sample()
    job, points = sampling_job(pipe, settings), []
    for point in parse_sweep(FLAGS.sweep) if FLAGS.sweep else [{}]:
        samples = job.with_settings(point)
        points.append((point, samples, samples.facts()))  # raises before anything is computed
    reference = sets.open_reference(FLAGS.reference, FLAGS.batch_size, job.image_size, data)
    held_out = None
    if isinstance(reference, sets.Split):
        classification.warn_if_classes_differ(pipe, reference.source)
        if FLAGS.reference == "train":
            held_out = held_out_images(data, job.image_size)
    return compare(judge, points, reference, held_out)


def held_out_images(data, image_size) -> sets.Split | None:
    """As many held-out images as samples, if there are: what real images score."""
    try:
        images = sets.Split(data, "test", image_size, FLAGS.batch_size, FLAGS.num_samples)
        problem = f"there are {len(images)}, and {classification.MIN_IMAGES} are needed"
        if len(images) >= classification.MIN_IMAGES:
            return images
    except UserError as error:
        problem = str(error)
    logger.warning("held-out images are not measured beside the samples: %s", problem)
    return None


def sampling_job(pipe, settings):
    """The samples to measure, cycling through the classes."""
    return sampling_runs.SamplingJob.cycling(
        pipe, FLAGS.num_samples, FLAGS.batch_size, FLAGS.seed, settings
    )


def compare(name: str, points, reference, held_out=None) -> str:
    """The table of the points of a sweep, or of a single point.

    Args:
        name: of the judge.
        points: for each point its settings, its images, and how they were made.
        reference: the images to compare with.
        held_out: real images to measure, too; None is none.
    """
    file = metrics_file()
    report.warn_if_sizes_differ(points[0][1], reference)
    judge = judges.make_judge(name)
    make_folder(file.parent)  # raises before anything is computed
    features = report.reference_features(reference, judge)
    described = {"reference": {"name": FLAGS.reference, **reference.describe()}}
    if held_out:
        real = report.measure(held_out, judge, features, file.parent / "held_out")
        described["metrics_of_real_test_images"] = real | {"images": len(held_out)}
    points = [(point, images, facts | described) for point, images, facts in points]
    if FLAGS.sweep:
        results = report.sweep(points, features, judge, file)
    else:
        ((_, images, facts),) = points
        results = [report.compare(images, features, judge, file, facts)]
    return report.table(results) if is_main() else ""


if __name__ == "__main__":
    cli.define_model_flags()
    cli.define_sampling_flags()
    cli.define_data_flags()
    flags.DEFINE_string(
        "out",
        None,
        "Folder for the results; by default a folder in WORKDIR/evaluation, or in "
        "runs/evaluation/NAME for a bundled model or one of a hub.",
    )
    flags.DEFINE_integer("num_samples", 1000, "Samples, cycling through the classes.", 10)
    flags.DEFINE_string("samples", None, "An .npz file of samples to compare; needs no model.")
    flags.DEFINE_string(
        "reference", None, "What to compare with: an .npz file, or the data set's train or test."
    )
    flags.DEFINE_enum(
        "judge",
        None,
        judges.JUDGES,
        "The network whose features are compared; by default inception for a --reference or "
        "--reconstruction, else classifier.",
    )
    flags.DEFINE_boolean("reconstruction", False, "Evaluate the tokenizer alone.")
    flags.DEFINE_string(
        "sweep", None, 'Settings to try: "content_guidance=1,3.5;1,4.5 top_p=1,0.5;1,0.7".'
    )
    cli.main(main, kept="Measured parts are kept; the same command measures the others.")
