"""Generates images: `python -m nvg_jax.sample --workdir=runs/digits --classes=0,1 --out=samples/`.

Writes a PNG for each sample, a grid of the first ones and stages.png, which shows the stages of
generation. If --out ends in .npz, writes one file with "arr_0", uint8 (N, H, W, 3), instead. Run
the same command again to resume a killed run. Sampling settings that are not given are those that
the model's folder recommends.
"""

from pathlib import Path

from absl import flags

from nvg_jax import cli
from nvg_jax.jobs.flags import define_flags, settings_from_flags
from nvg_jax.pipeline import Pipeline
from nvg_jax.runtime import processes

FLAGS = flags.FLAGS


def main(_):
    settings = settings_from_flags()
    pipeline = Pipeline.from_pretrained(FLAGS.workdir)
    pipeline.check_can_sample()
    names = FLAGS.classes or range(len(pipeline.class_names))
    classes = [pipeline.class_id(name) for name in names]

    from nvg_jax.jobs import sampling  # slow to import

    job = sampling.SamplingJob(
        pipeline,
        classes,
        per_class=FLAGS.per_class,
        batch_size=min(FLAGS.batch_size, len(classes) * FLAGS.per_class),
        seed=FLAGS.seed,
        settings=settings,
    )
    out = Path(FLAGS.out)
    if out.suffix == ".npz":
        sampling.write_array(job, out)
    else:
        sampling.write_images(job, out, columns=min(FLAGS.per_class, 20))
    if processes.is_main():
        print(f"{len(job)} samples: {out}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of a run, or an exported or converted model.")
    flags.DEFINE_string("out", None, "Folder for PNG files, or a file ending in .npz.")
    flags.DEFINE_list("classes", None, "Class names or ids; all classes if not given.")
    flags.DEFINE_integer("per_class", 8, "Samples of each class.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 64, "Samples a process makes at a time.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of all randomness.")
    define_flags()
    flags.mark_flags_as_required(["workdir", "out"])
    cli.run(main)
