"""From parts to their trainers."""

from collections.abc import Iterable

import ml_collections
from jax.sharding import Mesh

from nvg_jax.data import check_batch_size
from nvg_jax.models import ModelConfig
from nvg_jax.parts import BOTH_GENERATORS, DISTILLATION, TOKENIZER, Part
from nvg_jax.training.changes import MAY_CHANGE
from nvg_jax.training.distillation import DistillationTrainer
from nvg_jax.training.generators import GeneratorTrainer
from nvg_jax.training.length import START, warn_if_too_short
from nvg_jax.training.run import Run
from nvg_jax.training.tokenizer import TokenizerTrainer
from nvg_jax.training.trainer import Trainer, shared_trainer

# The section of a part's recipe -> how it is trained.
TRAINERS: dict[str, type[Trainer]] = {
    TOKENIZER.section: TokenizerTrainer,
    BOTH_GENERATORS.section: GeneratorTrainer,
    DISTILLATION.section: DistillationTrainer,
}


def make_trainer(
    part: Part, config: ml_collections.ConfigDict, model: ModelConfig, mesh: Mesh, num_images: int
) -> Trainer:
    """The trainer of a part; equal settings give the same one.

    Training that is resumed in the same process, for example after an interrupt in a notebook, then
    does not compile again. A trainer sees only the settings that may shape its program.

    Raises:
        UserError: invalid settings.
    """
    kind = TRAINERS[part.section]
    settings = {name: config[name] for name in kind.SETTINGS}
    settings[part.section] = {
        name: value for name, value in config[part.section].items() if name not in MAY_CHANGE
    }
    frozen = ml_collections.FrozenConfigDict(settings)
    return shared_trainer(kind, part, frozen, model, mesh, num_images, START)


def open_trainer(run: Run, part: Part) -> Trainer:
    """The trainer of a part of a run.

    Raises:
        UserError: invalid settings, or a batch that does not fit the mesh or the data set.
    """
    recipe = run.config[part.section]
    check_batch_size(run.train_source, run.loader_options(recipe.batch_size))
    trainer = make_trainer(part, run.config, run.model, run.mesh, len(run.train_source))
    warn_if_too_short(part.section, recipe, trainer.steps)
    return trainer


def pretrained_names(parts: Iterable[Part], config: ml_collections.ConfigDict) -> set[str]:
    """The names of the pretrained networks that training these parts needs."""
    names = (TRAINERS[part.section].pretrained_names(part, config) for part in parts)
    return set().union(*names)
