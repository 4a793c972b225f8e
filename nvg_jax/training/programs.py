"""A compiled training step with its abstract arguments: `train` runs it, `compile` lowers it.

Programs take and return arrays placed on a mesh. They are traced inside `jax.set_mesh` and
`nn.logical_axis_rules` of `nvg_jax.runtime.sharding`.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nvg_jax import models, pretrained
from nvg_jax.errors import UserError
from nvg_jax.runtime import sharding
from nvg_jax.tokenizer import TokenizerConfig
from nvg_jax.workdir import MAY_CHANGE, RECIPES

# The sections and settings of a config that shape programs, besides the recipes.
MODEL = ("tokenizer", *models.GENERATORS, "dtype", "class_dropout")


class TrainProgram(NamedTuple):
    """The training of one part.

    init: (key, ...) -> the initial state.
    step: (state, ...) -> (state, metrics); donates the state.
    evaluate: (parameters, ...) -> metrics.
    arguments: the abstract arguments of `step` at the configured batch size, with their shardings;
        `step.lower(*arguments)` compiles it without any data. The first one is the state.
    schedule: step -> learning rate.
    """

    init: Callable
    step: Callable
    evaluate: Callable
    arguments: tuple
    schedule: optax.Schedule

    @property
    def state(self) -> Any:
        """The abstract state with its shardings."""
        return self.arguments[0]


def shared(make_program: Callable[..., TrainProgram]) -> Callable[..., TrainProgram]:
    """Decorates `make_program(config, mesh, ...)`: equal settings give the same program.

    Training that is resumed in the same process, for example after an interrupt in a notebook, then
    does not compile again. `make_program` is called with a frozen config of the settings that may
    shape a program, and no others.
    """
    cached = functools.lru_cache(maxsize=4)(make_program)

    @functools.wraps(make_program)
    def shared_program(config: ml_collections.ConfigDict, mesh: Mesh, *arguments) -> TrainProgram:
        settings = {name: config[name] for name in MODEL}
        for name in set(RECIPES.values()):
            settings[name] = {k: v for k, v in config[name].items() if k not in MAY_CHANGE}
        return cached(ml_collections.FrozenConfigDict(settings), mesh, *arguments)

    return shared_program


def check_heads(config: ml_collections.ConfigDict, names: Iterable[str], mesh: Mesh):
    """Raises UserError for generators whose attention heads do not divide over a mesh."""
    for name in names:
        heads = config[name].width // config[name].head_dim
        if heads % mesh.shape["tensor"]:
            raise UserError(
                f"The {heads} attention heads of the {name} generator do not split over "
                f"mesh.tensor={mesh.shape['tensor']}; use a divisor of {heads}."
            )


def abstract_batch(tokenizer: TokenizerConfig, batch_size: int, mesh: Mesh):
    """The abstract training batch of images and labels."""
    batch = {
        "image": jax.ShapeDtypeStruct((batch_size, *tokenizer.image_size, 3), jnp.float32),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }
    return sharding.with_shardings(batch, NamedSharding(mesh, sharding.BATCH_SPEC))


def abstract_frozen(names: Iterable[str], mesh: Mesh):
    """The abstract parameters of pretrained networks, replicated on every device."""
    return sharding.with_shardings(
        {name: pretrained.abstract(name) for name in names}, NamedSharding(mesh, PartitionSpec())
    )


def abstract_key():
    return jax.eval_shape(jax.random.key, 0)
