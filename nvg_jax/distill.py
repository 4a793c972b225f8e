"""Distills the structure generator of a model, so that a split takes 1 to 4 evaluations, not 50.

python -m nvg_jax.distill --teacher=runs/fashion --config=configs/fashion_mnist.py \\
    --workdir=runs/fashion_few

The config says which data to use and, in its section `distillation`, how to train; sizes are the
teacher's. The workdir then holds the whole model, which recommends few steps: pass it to `sample`
and `evaluate`. Run the same command again to resume.
"""

import os

import ml_collections
from absl import flags
from ml_collections import config_flags

from nvg_jax import cli
from nvg_jax.errors import UserError
from nvg_jax.training.checks import check_recipe

FLAGS = flags.FLAGS


def distill(config: ml_collections.ConfigDict, teacher: str, workdir: str | os.PathLike):
    """Trains a student of `teacher` and writes the complete model to `workdir`; resumes.

    Raises:
        UserError: an invalid setting, teacher or data set; the message names a valid one.
        UserError: a metric is not finite; the message names the step and the metric.
        Preempted: SIGTERM arrived; the state is saved.
    """
    check_recipe(config, "distillation", ("distillation",))
    from nvg_jax import workdir as folders
    from nvg_jax.jobs.scoring import make_scorers
    from nvg_jax.runtime import sharding
    from nvg_jax.runtime.files import storage_path
    from nvg_jax.training import distillation
    from nvg_jax.training.loop import fit
    from nvg_jax.training.run import open_run

    workdir = storage_path(workdir)
    folders.check_export(workdir)
    if (workdir / folders.EXPORT_FOLDER).exists() and not (workdir / folders.DISTILLATION).exists():
        raise UserError(
            f"{workdir} holds a model already, which its student would replace; give another "
            "--workdir."
        )
    metadata, params = distillation.read_teacher(teacher)
    config = distillation.with_sizes(config, metadata)
    mesh = sharding.make_mesh(**config.mesh)
    with sharding.in_mesh(mesh):
        run = open_run(config, workdir, mesh, networks=())
        scorers = make_scorers(config, (folders.DISTILLATION,), run.train_source.num_classes)
        task = distillation.task(run, metadata, params)
        fit(task, workdir, mesh, scorers.get(folders.DISTILLATION))
    student, state = folders.read(
        workdir / folders.DISTILLATION,
        lambda m: {"ema_params": {"structure": m.abstract_params("structure")}},
    )
    folders.write_export(workdir, student, params | state["ema_params"])


def main(_):
    from nvg_jax.runtime import preemption

    preemption.watch()
    distill(FLAGS.config, FLAGS.teacher, FLAGS.workdir)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Configuration, as for `train`.")
    flags.DEFINE_string("teacher", None, cli.MODEL)
    flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and the model.")
    flags.mark_flags_as_required(["config", "teacher", "workdir"])
    cli.main(main, cli.compile_fast)
