"""Training: `python -m nvg_jax.train --config=configs/digits.py --workdir=runs/digits`.

Trains the tokenizer, then the generators on what it encodes. Run the same command again to resume.
`--config.part=` picks one part: tokenizer, structure, content, generators (both on the same
batches), separate (one after the other), or all.
"""

import os

import ml_collections
from absl import flags
from ml_collections import config_flags

from nvg_jax import cli
from nvg_jax.training.checks import PARTS_OF, check_config, check_init

FLAGS = flags.FLAGS


def train(config: ml_collections.ConfigDict, workdir: str | os.PathLike):
    """Trains the parts that `config.part` names, resuming from `workdir`.

    Raises:
        UserError: an invalid setting or data set; the message names a valid one.
        UserError: a metric is not finite; the message names the step and the metric.
        Preempted: SIGTERM arrived; the state is saved.
    """
    check_config(config)
    from nvg_jax.jobs.scoring import make_scorers
    from nvg_jax.runtime import sharding
    from nvg_jax.runtime.files import storage_path
    from nvg_jax.training import generators, tokenizer
    from nvg_jax.training.loop import fit
    from nvg_jax.training.run import open_run

    parts = PARTS_OF[config.part]
    networks = []
    for part in parts:
        if part == "tokenizer":
            networks += tokenizer.loss_config(config).pretrained
        else:
            names = generators.parts_of(part)
            networks += generators.pretrained_names(config, names)
    mesh = sharding.make_mesh(**config.mesh)
    with sharding.in_mesh(mesh):
        run = open_run(config, storage_path(workdir), mesh, networks)
        # A run that has already started no longer needs this folder.
        if config.init_from and not any((run.workdir / part).exists() for part in parts):
            check_init(config, parts)
        # Builds all programs, so that no setting of a later part is refused after days of training.
        for part in parts:
            if part == "tokenizer":
                tokenizer.build_program(run)
            else:
                generators.build_program(run, part)
        scorers = make_scorers(config, parts, run.train_source.num_classes)
        for part in parts:
            task = tokenizer.task(run) if part == "tokenizer" else generators.task(run, part)
            fit(task, run.workdir, mesh, scorers.get(part))


def main(_):
    from nvg_jax.runtime import preemption

    preemption.watch()
    train(FLAGS.config, FLAGS.workdir)


if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config", None, "Configuration, e.g. configs/digits.py or configs/imagenet256.py:d16."
    )
    flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and pictures.")
    flags.mark_flags_as_required(["config", "workdir"])
    cli.main(main, cli.compile_fast)
