"""Checks of a training's config that come before anything slow is imported or any data is read.

A single setting is checked by the dataclass that it becomes; here is what involves several of them.
"""

import ml_collections

from nvg_jax.errors import UserError
from nvg_jax.sampling.settings import check_dtype

# --config.part -> the parts it trains, each in its own folder of the workdir.
PARTS_OF = {
    "tokenizer": ("tokenizer",),
    "structure": ("structure",),
    "content": ("content",),
    "generators": ("generators",),
    "separate": ("tokenizer", "structure", "content"),
    "all": ("tokenizer", "generators"),
}


def check_config(config: ml_collections.ConfigDict):
    """Raises UserError for an invalid config, before any data is read or anything is compiled."""
    if config.part not in PARTS_OF:
        raise UserError(f"Unknown part {config.part!r}; choose one of {', '.join(PARTS_OF)}.")
    parts = PARTS_OF[config.part]
    if config.tokenizer_workdir and "tokenizer" in parts:
        raise UserError(
            f"part={config.part} trains a tokenizer in --workdir, but tokenizer_workdir names "
            "another one. Leave it empty, or train with part=generators."
        )
    for name in ("tokenizer_training", "generator_training"):
        check_recipe(config, name, parts)
    if config.data.name == "sequences":
        if "tokenizer" in parts:
            raise UserError(
                f"part={config.part} trains a tokenizer, which needs images, not cached sequences. "
                "Train the generators with part=generators and tokenizer_workdir."
            )
        if config.generator_training.repa_weight and parts != ("structure",):
            raise UserError(
                "Cached sequences have no images for REPA to compare with; turn it off with "
                "--config.generator_training.repa_weight=0, or train from the images."
            )
    check_sizes(config)


def check_sizes(config: ml_collections.ConfigDict):
    """Raises UserError for invalid sizes of a network."""
    from nvg_jax.layers import TransformerConfig
    from nvg_jax.models import GENERATORS
    from nvg_jax.tokenizer import TokenizerConfig

    TokenizerConfig(**config.tokenizer)
    for name in GENERATORS:
        TransformerConfig(**config[name])


def check_recipe(config: ml_collections.ConfigDict, name: str, parts: tuple[str, ...]):
    """Raises UserError for invalid settings in the section `name`, which trains `parts`."""
    check_dtype(config.dtype)
    for key in ("batch_size", "log_every", "eval_every", "save_every", "keep"):
        if config[name][key] < 1:
            raise UserError(f"{name}.{key} must be at least 1, got {config[name][key]}.")
    if config[name].eval_images < 0:
        raise UserError(
            f"{name}.eval_images must be 0 (all) or more, got {config[name].eval_images}."
        )
    if config[name].fid_every:
        check_fid(config, name, parts)


def check_init(config: ml_collections.ConfigDict, parts: tuple[str, ...]):
    """Raises UserError if config.init_from lacks something that one of the parts needs."""
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
    """Raises UserError if the recipe `name` requests an FID that cannot be measured."""
    recipe, judge = config[name], config.evaluation.judge
    if recipe.fid_every < 0 or recipe.fid_samples < 2:
        raise UserError(
            f"{name}.fid_every must be 0 (never) or more and fid_samples at least 2, got "
            f"{recipe.fid_every} and {recipe.fid_samples}."
        )
    if judge not in ("inception", "classifier"):
        raise UserError(f"evaluation.judge must be inception or classifier, got {judge!r}.")
    if name == "generator_training" and {"structure", "content"} & set(parts):
        raise UserError(
            f"generator_training.fid_every needs both generators to draw samples, and "
            f"part={config.part} trains them one at a time; set it to 0, or train with "
            "part=generators."
        )
    if judge == "classifier" and config.evaluation.reference != "train":
        raise UserError("evaluation.judge=classifier compares with evaluation.reference=train.")
    if config.data.name == "sequences" and not config.evaluation.reference.endswith(".npz"):
        raise UserError(
            "Cached sequences have no images to compare samples with: give "
            "--config.evaluation.reference=FILE.npz and --config.evaluation.judge=inception, or "
            f"set {name}.fid_every to 0."
        )
