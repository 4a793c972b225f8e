"""Sampling: `python -m nvg_jax.sample --workdir=runs/digits --classes=0,1,2 --per_class=8`.

Writes a PNG for every sample, a grid of the first ones and a picture of the stages; or, if --out
ends in .npz, one file with "arr_0", uint8 (N, H, W, 3). Run the same command again to resume.
Settings that are not given take the folder's recommended values.

Samples can keep parts of an image or follow a drawing (docs/control.md):

    --structure_from=cat.png --structure_stages=4 --token_stages=2
    --structure_map=drawing.png     or a ready-made one: --structure_map=circle_left
    --edit=cat.png --mask=mask.png --edit_from=2 --paste

With --walk_to=SEED, the samples of each class are a walk from the structure of --seed to that of
another seed.
"""

from absl import flags
from etils import epy

from nvg_jax import cli
from nvg_jax.errors import UserError
from nvg_jax.runtime.processes import is_main
from nvg_jax.runtime.storage import storage_path

with epy.lazy_imports():  # slow, and not needed to report a wrong flag
    from nvg_jax import pipeline
    from nvg_jax.jobs import editing, sampling_runs

FLAGS = flags.FLAGS
MAX_COLUMNS = 20  # columns of the grid


def main(_):
    settings = cli.sampling_settings()
    pipe = pipeline.Pipeline.from_pretrained(FLAGS.workdir, FLAGS.dtype)
    pipe.check_can_sample()
    classes = pipe.class_ids(FLAGS.classes or range(len(pipe.class_names)))
    batch_size = min(FLAGS.batch_size, len(classes) * FLAGS.per_class)
    job = sampling_runs.SamplingJob(
        pipe,
        classes,
        FLAGS.per_class,
        batch_size,
        FLAGS.seed,
        settings,
        constraint(pipe),
        FLAGS.walk_to,
    )
    out = storage_path(FLAGS.out)
    if out.suffix.lower() == ".npz":
        sampling_runs.write_array(job, out)
    else:
        sampling_runs.write_pictures(job, out, columns=min(FLAGS.per_class, MAX_COLUMNS))
    if is_main():
        print(f"{len(job)} samples: {out}")


def constraint(pipe):
    """What samples keep according to the flags, or None.

    Raises:
        UserError: flags that contradict each other, or a file that cannot be read.
    """
    chosen = [name for name in ("structure_from", "structure_map", "edit") if FLAGS[name].value]
    if len(chosen) > 1:
        raise UserError(f"Give only one of {', '.join(f'--{name}' for name in chosen)}.")
    needs = {"structure_stages": "structure_from", "token_stages": "structure_from"}
    needs |= {"mask": "edit", "edit_from": "edit", "paste": "edit", "feather": "paste"}
    for name, other in needs.items():
        if FLAGS[name].present and not FLAGS[other].value:
            raise UserError(f"--{name} needs --{other}.")
    if FLAGS.structure_from:
        stages = FLAGS.structure_stages, FLAGS.token_stages
        return editing.keep_stages(pipe, FLAGS.structure_from, *stages)
    if FLAGS.structure_map:
        return editing.follow_drawing(pipe, FLAGS.structure_map)
    if FLAGS.edit:
        feather = FLAGS.feather if FLAGS.paste else None
        return editing.edit_region(pipe, FLAGS.edit, FLAGS.mask, FLAGS.edit_from, feather)
    return None


if __name__ == "__main__":
    cli.define_model_flags()
    cli.define_sampling_flags()
    flags.DEFINE_string("out", None, "Folder for the pictures, or a file ending in .npz.")
    flags.DEFINE_list("classes", None, "Class names or ids (3, or id:3); by default all.")
    flags.DEFINE_integer("per_class", 8, "Samples of each class.", lower_bound=1)
    flags.DEFINE_integer("walk_to", None, "The seed to which the samples of each class walk.")
    flags.DEFINE_string("structure_from", None, "An image whose first stages are kept.")
    flags.DEFINE_integer("structure_stages", 4, "With --structure_from: maps to keep.", 1)
    flags.DEFINE_integer("token_stages", 0, "With --structure_from: stages of tokens to keep.", 0)
    flags.DEFINE_string(
        "structure_map", None, "A PNG whose colors are regions to follow, or a ready-made drawing."
    )
    flags.DEFINE_string("edit", None, "An image, a region of which is resampled.")
    flags.DEFINE_string("mask", None, "With --edit: a PNG of its size, white where to edit.")
    flags.DEFINE_integer(
        "edit_from", 0, "With --edit: the first stage to resample; later ones change less.", 0
    )
    flags.DEFINE_boolean("paste", False, "With --edit: put the original pixels back outside.")
    flags.DEFINE_integer("feather", 2, "With --paste: pixels over which to blend.", 0)
    flags.mark_flags_as_required(["workdir", "out"])
    cli.main(main, kept="Written samples are kept; the same command makes the others.")
