"""Distills the structure generator of a model, so that a split takes 1 to 4 evaluations, not 50.

python -m nvg_jax.distill --teacher=runs/fashion --config=configs/fashion_mnist.py \\
    --workdir=runs/fashion_few

The config says which data to use and, in its section `distillation`, how to train; sizes are the
teacher's. The workdir then holds the whole model, which recommends few steps: pass it to `sample`
and `evaluate`. Run the same command again to resume.
"""

import os
from collections.abc import Sequence

import ml_collections
from absl import flags
from etils import epy

from nvg_jax import cli, presets
from nvg_jax.errors import UserError, comes_with
from nvg_jax.parts import DISTILLATION
from nvg_jax.runtime import preemption, watchdog
from nvg_jax.training.checks import check_process, check_recipes, check_resume

with epy.lazy_imports(error_callback=comes_with("train")):  # slow
    from nvg_jax import metadata
    from nvg_jax import workdir as workdirs
    from nvg_jax.jobs import training
    from nvg_jax.runtime import checkpoint, sharding
    from nvg_jax.training import changes, distillation, run

FLAGS = flags.FLAGS


@preemption.interruptible()
def distill(
    config: ml_collections.ConfigDict,
    teacher: str,
    workdir: str | os.PathLike,
    allow_changes: Sequence[str] = (),
    resume_step: int | None = None,
):
    """Trains a student of `teacher` and writes the complete model to `workdir`; resumes.

    Args:
        allow_changes, resume_step: as for `train`.

    Raises:
        UserError: an invalid setting, teacher or data set, or a metric that is not finite; the
            message says what is valid, or names the step and the metric.
        Preempted: SIGTERM arrived; the state is saved.
        Interrupted: a KeyboardInterrupt; Ctrl-C or a notebook's stop button did the same.
    """
    check_process(config)
    check_recipes(config, (DISTILLATION,))
    if config.lora.rank:
        raise UserError(
            f"lora.rank={config.lora.rank} is of `train`; a student is trained with all its "
            "weights. Leave it out."
        )
    resume = changes.Resume(tuple(allow_changes), resume_step)
    check_resume(config, (DISTILLATION,), resume)
    workdir = checkpoint.run_folder(workdir)
    metadata.check_export(workdir)
    if metadata.holds_model(workdir) and not (workdir / DISTILLATION.name).exists():
        raise UserError(
            f"{workdir} holds a model already, which its student would replace; give another "
            "--workdir."
        )
    of_teacher, params = distillation.read_teacher(teacher)
    config = distillation.with_teacher(config, of_teacher)
    mesh = sharding.make_mesh(**config.mesh)
    with sharding.in_mesh(mesh):
        opened = run.open_run(config, workdir, mesh, teacher=(of_teacher, params), resume=resume)
        training.train_parts(opened, [DISTILLATION])
    student, structure = workdirs.read_averages(workdir / DISTILLATION.name, "structure")
    metadata.write_export(workdir, student, params | {"structure": structure})


def main(_):
    preemption.watch()
    watchdog.start(FLAGS.config.stall_timeout)
    distill(FLAGS.config, FLAGS.teacher, FLAGS.workdir, FLAGS.allow_changes, FLAGS.resume_step)


def set_up():
    check_process(FLAGS.config)
    cli.compile_fast()


if __name__ == "__main__":
    presets.define_flag()
    flags.DEFINE_string("teacher", None, cli.MODEL)
    flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and the model.")
    cli.define_resume_flags()
    flags.mark_flags_as_required(["config", "teacher", "workdir"])
    cli.main(main, set_up, kept="The same command goes on from the last checkpoint, if any.")
