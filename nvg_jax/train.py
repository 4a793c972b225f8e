"""Training: `python -m nvg_jax.train --config=configs/digits.py --workdir=runs/digits`.

Trains the tokenizer, then the generators on what it encodes. Run the same command again to resume.
`--config.part=` picks one part: tokenizer, structure, content, generators (both on the same
batches), separate (one after the other), or all.

`--check` rehearses the run on the machines that it is for: it reads a batch, writes and reads back
a small checkpoint, compiles, takes a few steps, and tells hours and device-hours of the whole run
(their cost with `--price`). `--check_only` checks the arguments alone, without data and devices:
launchers do so before they pay for a machine.
"""

import os
import sys
from collections.abc import Sequence

import ml_collections
from absl import flags
from etils import epath, epy

from nvg_jax import cli, presets
from nvg_jax.errors import UserError, comes_with
from nvg_jax.parts import CHOICES
from nvg_jax.runtime import preemption, watchdog
from nvg_jax.training import checks

with epy.lazy_imports(error_callback=comes_with("train")):  # slow
    from nvg_jax import metadata
    from nvg_jax.jobs import training
    from nvg_jax.runtime import checkpoint, sharding, storage
    from nvg_jax.training import changes, initial, registry, run

FLAGS = flags.FLAGS


@preemption.interruptible()
def train(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike,
    allow_changes: Sequence[str] = (),
    resume_step: int | None = None,
    check: bool = False,
    price: float = 0.0,
):
    """Trains the parts that `config.part` names, resuming from `workdir`.

    Args:
        allow_changes: settings that may differ from those the run was started with, such as
            "learning_rate"; a section allows all of its settings.
        resume_step: goes back to the checkpoint of this step; later ones are renamed.
        check: rehearses the run instead, see `rehearsal.rehearse`.
        price: with `check`, the price of a device for an hour.

    Raises:
        UserError: an invalid setting or data set, or a metric that is not finite; the message says
            what is valid, or names the step and the metric.
        Preempted: SIGTERM arrived; the state is saved.
        Interrupted: a KeyboardInterrupt; Ctrl-C or a notebook's stop button did the same.
    """
    resume = changes.Resume(tuple(allow_changes), resume_step)
    workdir = check_arguments(config, workdir, resume)
    check_workdir(workdir)
    parts = CHOICES[config.part]
    mesh = sharding.make_mesh(**config.mesh)
    with sharding.in_mesh(mesh):
        # A part that has already started reads init_from again only for adapters, in `open`.
        new = [part for part in parts if not (workdir / part.name).exists()]
        if config.init_from and new:
            initial.check_init(config, new)
        names = registry.pretrained_names(parts, config)
        opened = run.open_run(config, workdir, mesh, names, resume=resume)
        if check:
            training.rehearse_parts(opened, parts, price)
        else:
            training.train_parts(opened, parts)


def check_arguments(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike, resume: "changes.Resume"
) -> epath.Path:
    """The folder to train in; raises UserError for arguments that cannot work."""
    checks.check_config(config)
    checks.check_resume(config, CHOICES[config.part], resume)
    return checkpoint.run_folder(workdir)


def check_workdir(workdir: epath.Path):
    if metadata.read_export_metadata(workdir):
        raise UserError(
            f"{workdir} holds an exported model, which would hide the one that is trained there; "
            "give another --workdir, and this folder as --config.init_from or tokenizer_workdir."
        )


def main(_):
    preemption.watch()
    watchdog.start(FLAGS.config.stall_timeout)
    train(
        FLAGS.config,
        FLAGS.workdir,
        FLAGS.allow_changes,
        FLAGS.resume_step,
        FLAGS.check,
        FLAGS.price,
    )


def set_up():
    if FLAGS.check_only:
        resume = changes.Resume(tuple(FLAGS.allow_changes), FLAGS.resume_step)
        workdir = check_arguments(FLAGS.config, FLAGS.workdir, resume)
        if not storage.in_bucket(workdir):  # this machine may have no access to the bucket
            check_workdir(workdir)
        sys.exit()
    checks.check_process(FLAGS.config)
    cli.compile_fast()


if __name__ == "__main__":
    presets.define_flag()
    flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and pictures.")
    flags.DEFINE_boolean(
        "check_only", False, "Check the flags and the config, without data and devices, and end."
    )
    flags.DEFINE_boolean("check", False, "Rehearse the run on these machines, and end.")
    flags.DEFINE_float("price", 0.0, "With --check: the price of a device for an hour.", 0.0)
    flags.register_multi_flags_validator(
        ["price", "check"],
        lambda given: given["check"] or not given["price"],
        "--price needs --check.",
    )
    cli.define_resume_flags()
    flags.mark_flags_as_required(["config", "workdir"])
    cli.main(main, set_up, kept="The same command goes on from the last checkpoint, if any.")
