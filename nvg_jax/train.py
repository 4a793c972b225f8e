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
from nvg_jax.sampling.settings import check_dtype

# --config.part -> the parts it trains, each in its own folder of the workdir.
PARTS = {
    "tokenizer": ("tokenizer",),
    "structure": ("structure",),
    "content": ("content",),
    "generators": ("generators",),
    "separate": ("tokenizer", "structure", "content"),
    "all": ("tokenizer", "generators"),
}


def train(config: ml_collections.ConfigDict, workdir: str | os.PathLike):
    """Trains the parts that `config.part` names, resuming from `workdir`.

    Raises:
        ValueError: an invalid setting or data set; the message names a valid one.
        FloatingPointError: a metric is not finite; the message names the step and the metric.
        Preempted: SIGTERM arrived; the state is saved.
    """
    check_config(config)
    from nvg_jax.jobs.scoring import make_scorers
    from nvg_jax.runtime import sharding
    from nvg_jax.runtime.files import storage_path
    from nvg_jax.training import generators, tokenizer
    from nvg_jax.training.loop import fit
    from nvg_jax.training.run import open_run

    parts = PARTS[config.part]
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


def check_config(config: ml_collections.ConfigDict):
    """Raises ValueError for an invalid config, before any data is read or anything is compiled."""
    if config.part not in PARTS:
        raise ValueError(f"Unknown part {config.part!r}; choose one of {', '.join(PARTS)}.")
    parts = PARTS[config.part]
    if config.tokenizer_workdir and "tokenizer" in parts:
        raise ValueError(
            f"part={config.part} trains a tokenizer in --workdir, but tokenizer_workdir names "
            "another one. Leave it empty, or train with part=generators."
        )
    for name in ("tokenizer_training", "generator_training"):
        check_recipe(config, name, parts)
    if config.data.name == "sequences":
        if "tokenizer" in parts:
            raise ValueError(
                f"part={config.part} trains a tokenizer, which needs images, not cached sequences. "
                "Train the generators with part=generators and tokenizer_workdir."
            )
        if config.generator_training.repa_weight and parts != ("structure",):
            raise ValueError(
                "Cached sequences have no images for REPA to compare with; turn it off with "
                "--config.generator_training.repa_weight=0, or train from the images."
            )


def check_recipe(config: ml_collections.ConfigDict, name: str, parts: tuple[str, ...]):
    """Raises ValueError for invalid settings in the section `name`, which trains `parts`."""
    check_dtype(config.dtype)
    for key in ("batch_size", "log_every", "eval_every", "save_every", "keep"):
        if config[name][key] < 1:
            raise ValueError(f"{name}.{key} must be at least 1, got {config[name][key]}.")
    if config[name].eval_images < 0:
        raise ValueError(
            f"{name}.eval_images must be 0 (all) or more, got {config[name].eval_images}."
        )
    if config[name].fid_every:
        check_fid(config, name, parts)


def check_init(config: ml_collections.ConfigDict, parts: tuple[str, ...]):
    """Raises ValueError if config.init_from lacks something that one of the parts needs."""
    from nvg_jax import models
    from nvg_jax.layers import TransformerConfig
    from nvg_jax.tokenizer import TokenizerConfig
    from nvg_jax.training.generators import parts_of
    from nvg_jax.training.initial import check_model

    sizes, tokenizer = {}, TokenizerConfig(**config.tokenizer)
    for part in parts:
        for name in parts_of(part):
            transformer = None if name == "tokenizer" else TransformerConfig(**config[name])
            sizes[name] = models.abstract_params(name, tokenizer, transformer)
    check_model(config.init_from, sizes)


def check_fid(config: ml_collections.ConfigDict, name: str, parts: tuple[str, ...]):
    """Raises ValueError if the recipe `name` requests an FID that cannot be measured."""
    recipe, judge = config[name], config.evaluation.judge
    if recipe.fid_every < 0 or recipe.fid_samples < 2:
        raise ValueError(
            f"{name}.fid_every must be 0 (never) or more and fid_samples at least 2, got "
            f"{recipe.fid_every} and {recipe.fid_samples}."
        )
    if judge not in ("inception", "classifier"):
        raise ValueError(f"evaluation.judge must be inception or classifier, got {judge!r}.")
    if name == "generator_training" and {"structure", "content"} & set(parts):
        raise ValueError(
            f"generator_training.fid_every needs both generators to draw samples, and "
            f"part={config.part} trains them one at a time; set it to 0, or train with "
            "part=generators."
        )
    if judge == "classifier" and config.evaluation.reference != "train":
        raise ValueError("evaluation.judge=classifier compares with evaluation.reference=train.")
    if config.data.name == "sequences" and not config.evaluation.reference.endswith(".npz"):
        raise ValueError(
            "Cached sequences have no images to compare samples with: give "
            "--config.evaluation.reference=FILE.npz and --config.evaluation.judge=inception, or "
            f"set {name}.fid_every to 0."
        )


FLAGS = flags.FLAGS


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
