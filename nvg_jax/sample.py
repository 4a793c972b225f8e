"""Sampling: `python -m nvg_jax.sample --workdir=runs/digits --classes=0,1,2 --per_class=8`.

Writes a PNG for every sample, a grid of the first ones and a picture of the stages; or, if --out
ends in .npz, one file with "arr_0", uint8 (N, H, W, 3). Run the same command again to resume.
Settings that are not given take the folder's recommended values.
"""

from pathlib import Path

from absl import flags

from nvg_jax import cli

FLAGS = flags.FLAGS
MAX_COLUMNS = 20  # of the grid


def main(_):
    settings = cli.sampling_settings()
    from nvg_jax.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(FLAGS.workdir, FLAGS.dtype)
    pipeline.check_can_sample()
    from nvg_jax.jobs import sampling
    from nvg_jax.runtime.processes import is_main

    names = FLAGS.classes or range(len(pipeline.class_names))
    classes = [pipeline.class_id(name) for name in names]
    batch_size = min(FLAGS.batch_size, len(classes) * FLAGS.per_class)
    job = sampling.SamplingJob(pipeline, classes, FLAGS.per_class, batch_size, FLAGS.seed, settings)
    out = Path(FLAGS.out)
    if out.suffix == ".npz":
        sampling.write_array(job, out)
    else:
        sampling.write_pictures(job, out, columns=min(FLAGS.per_class, MAX_COLUMNS))
    if is_main():
        print(f"{len(job)} samples: {out}")


if __name__ == "__main__":
    cli.define_model_flags()
    cli.define_sampling_flags()
    flags.DEFINE_string("out", None, "Folder for the pictures, or a file ending in .npz.")
    flags.DEFINE_list("classes", None, "Class names or ids; all classes by default.")
    flags.DEFINE_integer("per_class", 8, "Samples of each class.", lower_bound=1)
    flags.mark_flags_as_required(["workdir", "out"])
    cli.main(main)
