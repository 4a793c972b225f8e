"""Checks of a training's config that come before anything slow is imported or any data is read.

Numbers have their ranges in `ranges.py`; names are checked by the dataclass that they become. Here
are those that become none, and what involves several settings.
"""

from collections.abc import Sequence

import ml_collections
from etils import epy

from nvg_jax.data.sources import SPLITS, check_name
from nvg_jax.errors import UserError, comes_with, did_you_mean
from nvg_jax.parts import CHOICES, PARTS, TOKENIZER, Part
from nvg_jax.runtime import hardware
from nvg_jax.sampling.settings import TRAINING_DTYPES, check_dtype
from nvg_jax.training.ranges import check_settings

with epy.lazy_imports(error_callback=comes_with("train")):  # slow
    from flax import traverse_util

    from nvg_jax import hub, models
    from nvg_jax.data import loader, transforms
    from nvg_jax.evaluation import judges
    from nvg_jax.runtime import storage
    from nvg_jax.training import changes, generators, length, optimizers, registry


def check_config(config: ml_collections.ConfigDict):
    """Raises UserError for an invalid config, before any data is read or anything is compiled."""
    check_process(config)
    if config.part not in CHOICES:
        raise UserError(f"Unknown part {config.part!r}; choose one of {', '.join(CHOICES)}.")
    parts = CHOICES[config.part]
    trains_tokenizer = TOKENIZER in parts
    if config.tokenizer_workdir and trains_tokenizer:
        raise UserError(
            f"part={config.part} trains a tokenizer in --workdir, but tokenizer_workdir names "
            "another one. Leave it empty, or train with part=generators."
        )
    if config.lora.rank and (trains_tokenizer or not config.init_from):
        raise UserError(
            "lora.rank trains adapters of another model's generators: give that model as "
            "--config.init_from, its tokenizer as --config.tokenizer_workdir, and "
            "--config.part=generators (or content, structure)."
        )
    if config.lora.rank and config.generator_training.optimizer.name == "muon":
        raise UserError(
            "Adapters (lora.rank) are trained by AdamW: leave generator_training.optimizer.name="
            "muon out."
        )
    check_recipes(config, parts)
    if config.data.name == "sequences":
        if trains_tokenizer:
            raise UserError(
                f"part={config.part} trains a tokenizer, which needs images, not cached sequences. "
                "Train the generators with part=generators and tokenizer_workdir."
            )
        if "dinov2" in registry.pretrained_names(parts, config):
            raise UserError(
                "Cached sequences have no images for REPA to compare with; turn it off with "
                "--config.generator_training.repa_weight=0, or train from the images."
            )
    check_sizes(config, parts)
    check_name(config.data.name)
    check_paths(config)
    registry.pretrained_names(parts, config)  # checks the losses


def check_paths(config: ml_collections.ConfigDict):
    """Raises UserError for paths that no machine can read."""
    for name in ("init_from", "tokenizer_workdir"):
        if config[name] and not hub.is_remote(config[name]):
            storage.storage_path(config[name])
    for name, path in (
        ("pretrained_dir", config.pretrained_dir),
        ("data.data_dir", config.data.data_dir),
    ):
        if path:
            storage.local_path(path, name)


def check_sizes(config: ml_collections.ConfigDict, parts: tuple[Part, ...]):
    """Raises UserError for invalid sizes, or settings that do not fit them or the data's."""
    model = models.ModelConfig.from_config(config, num_classes=0)
    sizes = model.tokenizer
    if any(name not in model.networks for part in parts for name in part.networks):
        raise UserError(
            f"tokenizer.structure={sizes.structure} needs no structure generator: train with "
            "--config.part=tokenizer, then with --config.part=content."
        )
    generators.sampling_settings(config).expand(sizes.num_stages, sizes.codebook_size)
    for part in parts:
        if repa := generators.repa_config(config, part):
            repa.check(model.generators["content"].depth, sizes.latent_size)
    data = config.data
    resize = 0 if data.name == "sequences" else data.resize  # they are prepared already
    resize_filter = data.resize_filter or transforms.DEFAULT_FILTER
    transform = transforms.Transform(sizes.image_size, resize, data.pad, resize_filter)
    loader.LoaderOptions(transform, process_batch_size=1, on_bad=data.on_bad)


def check_process(config: ml_collections.ConfigDict):
    """Raises UserError for invalid settings of a whole process, whatever it trains."""
    check_settings(config)
    steps = tuple(config.profile_steps)
    if steps and (len(steps) != 2 or steps[0] > steps[1]):
        raise UserError(
            f"profile_steps must be () or (first, last), such as (100, 105), got {steps}."
        )
    hardware.check_options()


def check_recipes(config: ml_collections.ConfigDict, parts: tuple[Part, ...]):
    """Raises UserError for invalid settings of any part, or an FID of `parts` without a judge.

    In a fixed order, so that all processes report the same mistake first.
    """
    for name in dict.fromkeys(part.section for part in PARTS.values()):
        check_dtype(config[name].get("dtype") or config.dtype, TRAINING_DTYPES)
        resolved = length.resolved(config[name], num_images=10**6)  # the data's size comes later
        optimizers.OptimizerConfig(**resolved.optimizer)
        trained = [part for part in parts if part.section == name]
        if config[name].fid_every and trained:
            check_fid(config, name, trained)


def check_resume(
    config: ml_collections.ConfigDict, parts: tuple[Part, ...], resume: "changes.Resume"
):
    """Raises UserError for names of settings that do not exist, or a step of an unnamed part."""
    settings = traverse_util.flatten_dict(config.to_dict(), sep=".")
    for name in resume.allow_changes:
        if not any(changes.covers(name, path) for path in settings):
            names = {part for path in settings for part in path.split(".")}
            raise UserError(
                f"--allow_changes: there is no setting {name!r}.{did_you_mean(name, names)}"
            )
    if resume.step is not None and len(parts) > 1:
        raise UserError(
            f"--resume_step is a step of one part, and part={config.part} trains "
            f"{' and '.join(part.name for part in parts)}; name it with --config.part."
        )


def check_fid(config: ml_collections.ConfigDict, name: str, parts: Sequence[Part]):
    """Raises UserError if the recipe `name` of `parts` requests an FID that cannot be measured."""
    judge = config.evaluation.judge
    if judge not in judges.JUDGES:
        raise UserError(f"evaluation.judge must be {' or '.join(judges.JUDGES)}, got {judge!r}.")
    if not all(part.images for part in parts):
        raise UserError(
            f"{name}.fid_every is measured only where both generators are trained together "
            f"(part=generators or all), and this is part={config.part}; set it to 0."
        )
    reference = config.evaluation.reference
    if judge in judges.FITTED and reference != "train":
        raise UserError(f"evaluation.judge={judge} compares with evaluation.reference=train.")
    if reference not in SPLITS and not reference.endswith(".npz"):
        raise UserError(
            f"evaluation.reference must be train, test or an .npz file, got {reference!r}."
        )
    if config.data.name == "sequences" and not reference.endswith(".npz"):
        raise UserError(
            "Cached sequences have no images to compare samples with: give "
            "--config.evaluation.reference=FILE.npz and --config.evaluation.judge=inception (or "
            f"efficientnet), or set {name}.fid_every to 0."
        )
